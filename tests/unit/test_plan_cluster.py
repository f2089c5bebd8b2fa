"""GPUs as data, clusters, and the time of single actions: against figures worked out by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow.errors import PlanError
from counterflow.planner.cluster import Cluster, build_cluster, find_gpu, read_gpus
from counterflow.planner.config import ClusterSection
from counterflow.planner.constants import Constants, read_constants
from counterflow.planner.layouts import Layout, Training
from counterflow.planner.models import AttentionShape, FFNShape, LayerShape, MoEShape
from counterflow.planner.times import Setting, time_core, time_layer, time_products, time_transfer
from tests.support.running import refuses

WANTED = ("H100", "H200", "B200", "B300", "GB200", "GB300", "MI300X", "MI325X", "MI355X", "H800", "A100")
GQA = AttentionShape("gqa", 32, 4, 128, 128)
EXPERTS = MoEShape(64, 8, FFNShape(1024, True))
LAYER = LayerShape(2048, GQA, None, EXPERTS)


def make_setting(gpu: str = "H100", layout: Layout | None = None, precision: str = "bf16", seq: int = 4096) -> Setting:
    cluster = build_cluster(ClusterSection(gpu=gpu))
    return Setting(cluster, Constants(priors=True), layout or Layout(), Training(seq, 64, precision))


@pytest.mark.parametrize("name", WANTED)
def test_every_gpu_has_figures_a_source_and_constants(name: str) -> None:
    gpu = read_gpus()[name]
    assert gpu.source and {"bf16"} <= set(gpu.peak)
    assert gpu.hbm > 1e12 and gpu.nvlink > gpu.network > 1e10 and gpu.memory_gib > 75
    for number_format in set(gpu.peak) - {"fp32", "fp16"}:
        assert f"gemm.{gpu.family}.{number_format}" in read_constants()
    assert f"attention.{gpu.family}" in read_constants()


@pytest.mark.parametrize("constant", read_constants().values(), ids=list(read_constants()))
def test_every_constant_has_a_source_and_a_spread(constant: object) -> None:
    assert getattr(constant, "source", "") and 0 < getattr(constant, "spread", 0) < 1


def test_a_gpu_is_found_by_alias_and_a_strange_one_gets_the_nearest_names() -> None:
    assert find_gpu("h100-sxm").name == "H100" and find_gpu("GB200-NVL72").name == "GB200"
    with refuses("nearest: H100", PlanError):
        find_gpu("H100X")


def test_a_plan_overrides_the_links_of_its_gpus() -> None:
    cluster = build_cluster(ClusterSection(gpu="H100", nvlink_gbps=200.0, network_gbps=40.0, oversubscription=2.0, memory_gib=64))
    assert (cluster.nvlink, cluster.network, cluster.memory_gib) == (200e9, 20e9, 64)
    assert build_cluster(ClusterSection(gpu="GB300")).domain == 72
    assert build_cluster(ClusterSection(gpu="H100", gpus_per_node=4)).domain == 4


def test_a_large_product_takes_its_operations_over_the_peak_that_is_reached() -> None:
    setting = make_setting()
    seconds = time_products(setting, 16384, 16384, 16384)
    reached = 2 * 16384**3 / seconds / setting.cluster.gpu.find_peak("bf16")
    assert 0.9 * read_constants()["gemm.hopper.bf16"].prior < reached < read_constants()["gemm.hopper.bf16"].prior
    # A row of tokens reads the whole matrix: the memory bounds it.
    moved = 2 * (16384 * 16384 + 16384 + 16384)
    assert time_products(setting, 1, 16384, 16384) == pytest.approx(moved / setting.memory_rate)


def test_a_causal_attention_sees_half_of_its_keys_and_a_window_no_more_than_its_size() -> None:
    setting = make_setting(seq=65536)
    whole, half = time_core(GQA, setting).f.attention, time_core(replace(GQA, heads=16), setting).f.attention
    assert whole == pytest.approx(2 * half)
    assert time_core(replace(GQA, window=128), setting).f.attention < whole / 30


def test_tokens_cross_the_network_once_for_each_domain_under_dispatch_kernels() -> None:
    def exchange(dispatcher: str, ep: int, groups: int | None = None) -> float:
        setting = make_setting(layout=Layout(ep=ep, dp=64, dispatcher=dispatcher))
        return time_transfer(replace(EXPERTS, group_topk=groups), 2048, setting)

    assert exchange("deepep", 64) < exchange("alltoall", 64) / 1.4
    assert exchange("deepep", 64, groups=2) < exchange("deepep", 64) < exchange("allgather", 64)
    assert exchange("alltoall", 1) == 0 and exchange("alltoall", 8) < exchange("alltoall", 16) / 3


def test_what_a_layer_recomputes_makes_its_input_gradient_longer_and_nothing_else() -> None:
    from counterflow.planner.layouts import Recompute

    plain = time_layer(LAYER, make_setting(layout=Layout(ep=8, dp=8)))
    full = time_layer(LAYER, make_setting(layout=Layout(ep=8, dp=8, recompute=Recompute("full", frozenset(), "uniform", 1))))
    act = time_layer(
        LAYER, make_setting(layout=Layout(ep=8, dp=8, recompute=Recompute("selective", frozenset({"moe_act"}))))
    )  # fmt: skip
    assert full.f == plain.f == act.f and full.w == plain.w
    assert full.i.device == pytest.approx(plain.i.device + plain.f.device)
    assert plain.i.device < act.i.device < full.i.device


def test_a_graph_of_the_whole_step_leaves_the_host_nothing_to_launch() -> None:
    eager = time_layer(LAYER, make_setting("B200", Layout(ep=8, dp=8), "mxfp8"))
    parts = time_layer(LAYER, make_setting("B200", Layout(ep=8, dp=8, cuda_graph=("attn", "moe_router")), "mxfp8"))
    whole = time_layer(LAYER, make_setting("B200", Layout(ep=8, dp=8, cuda_graph=("full_iteration",)), "mxfp8"))
    assert eager.f.host > parts.f.host > whole.f.host == 0
    assert whole.f.sync == 0 < eager.f.sync


@pytest.mark.parametrize("gpu", WANTED)
def test_narrow_formats_are_not_slower_where_the_gpu_has_them(gpu: str) -> None:
    large = LayerShape(8192, AttentionShape("gqa", 64, 8, 128, 128), FFNShape(28672, True), None)
    times = {name: time_layer(large, make_setting(gpu, precision=name)).f.device for name in ("bf16", "fp8-tensorwise", "mxfp8")}
    assert times["fp8-tensorwise"] <= 1.05 * times["bf16"] and times["mxfp8"] <= 1.05 * times["bf16"]


def test_a_gpu_is_added_in_one_place() -> None:
    source = Path(__file__).resolve().parents[2] / "plugin" / "counterflow"
    for path in source.rglob("planner/*.py"):
        assert not re.search(r"[\"'](GB?[23]00|[AH][12]00|MI3\d\dX)[\"']", path.read_text()), f"{path} names a GPU"


def test_ranks_of_one_domain_use_its_links() -> None:
    cluster = Cluster(find_gpu("H100"), 8, 450e9, 50e9, 79.0)
    assert cluster.find_rate(8) == 450e9 and cluster.find_rate(2, 8) == 50e9 and cluster.count_domains(64) == 8
