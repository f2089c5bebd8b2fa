"""Memory by formula: static parts against tensors counted one by one, activations against published runs, and what fits."""

import math
from dataclasses import replace

import pytest

from counterflow.planner.config import ModelSection, parse_config
from counterflow.planner.layouts import Layout, Plan, Recompute, Training, build_table, complete_plan, place_layers
from counterflow.planner.memory import GIB, estimate_memory
from counterflow.planner.models import ModelShape, build_model
from counterflow.schedule import Costs, simulate

STATIC = ("weights", "gradients", "optimizer")


def list_tensors(model: ModelShape, layout: Layout, rank: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of all dense and all expert weights of a pipeline rank, as Megatron's modules have them."""
    dense: list[tuple[int, ...]] = []
    experts: list[tuple[int, ...]] = []
    h, tp = model.hidden, layout.tp
    words = math.ceil(model.vocab / (128 * tp)) * 128

    def add_layer(layer: object) -> None:
        a = layer.attention  # type: ignore[attr-defined]
        dense.extend([(h,), (h,)])
        if a.kind == "mla":
            dense.extend([(a.q_lora, h), (a.kv_lora + a.rope_dim, h), (a.q_lora,), (a.kv_lora,)])
            dense.append((a.heads * a.head_dim // tp, a.q_lora))
            dense.append((a.heads * (a.qk_nope + a.v_head_dim) // tp, a.kv_lora))
            dense.append((h, a.heads * a.v_head_dim // tp))
        else:
            dense.append(((a.heads + 2 * a.kv_heads) * a.head_dim // tp, h))
            dense.append((h, a.heads * a.head_dim // tp))
            if a.qk_norm:
                dense.extend([(a.head_dim,), (a.head_dim,)])
        moe = layer.moe  # type: ignore[attr-defined]
        if moe is None:
            size = layer.ffn.size // tp  # type: ignore[attr-defined]
            dense.extend([(2 * size, h), (h, size)])
            return
        dense.append((moe.experts, h))
        if moe.shared is not None:
            dense.extend([(2 * moe.shared.size // tp, h), (h, moe.shared.size // tp)])
        for _ in range(moe.experts // layout.ep):
            experts.extend([(2 * moe.expert.size // layout.etp, h), (h, moe.expert.size // layout.etp)])

    for index, stage in enumerate(place_layers(model, layout)):
        if index % layout.pp != rank:
            continue
        for layer in stage.layers:
            add_layer(layer)
        if stage.embedding:
            dense.append((words, h))
        if stage.head:
            dense.append((words, h))
        # The last norm ends the decoder, before MTP layers on a stage of their own.
        if stage.numbers and stage.numbers[-1] == len(model.layers) - 1:
            dense.append((h,))
        for _ in range(stage.mtp):
            dense.extend([(words, h), (h, 2 * h // tp), (h,), (h,), (h,)])
            add_layer(model.mtp)
    return dense, experts


def count_static(model: ModelShape, layout: Layout, rank: int) -> float:
    dense, experts = (sum(map(math.prod, tensors)) for tensors in list_tensors(model, layout, rank))
    shards, expert_shards = layout.dp * layout.cp, layout.tp * layout.cp * layout.dp / layout.ep / layout.etp
    return 6 * (dense + experts) + 12 * (dense / shards + experts / expert_shards)


GRID = [
    (
        "DeepSeek-V3",
        Layout(pp=16, ep=64, dp=128, account_for_embedding=True, account_for_loss=True, vpp=1, sequence_parallel=True),
    ),
    ("DeepSeek-V3", Layout(tp=2, pp=8, vpp=4, ep=32, dp=64, schedule="interleaved", pipeline_layout="Et|(tt|)*30mL")),
    (
        "Qwen3-235B-A22B",
        Layout(tp=2, pp=8, ep=32, dp=16, etp=1, pipeline_layout="E" + "t" * 11 + "|" + ("t" * 12 + "|") * 6 + "t" * 11 + "L"),
    ),
    ("Qwen3-30B-A3B", Layout(tp=1, pp=1, ep=16, dp=16)),
    ("Mixtral-8x7B", Layout(tp=2, pp=4, ep=4, etp=2, dp=8)),
    ("Llama-3-70B", Layout(tp=4, pp=4, vpp=5, cp=2, dp=2, schedule="interleaved")),
]


@pytest.mark.parametrize(
    ("name", "layout"), GRID, ids=lambda one: one if isinstance(one, str) else f"tp{one.tp}-pp{one.pp}-vpp{one.vpp}"
)
def test_static_memory_is_that_of_the_tensors(name: str, layout: Layout) -> None:
    model = build_model(ModelSection(name=name))
    if layout.account_for_embedding:
        # 61 layers and both ends are 63, which nothing divides: the layers are dealt.
        layout = replace(
            layout, account_for_embedding=False, account_for_loss=False, pipeline_layout="Ettt|" + "tttt|" * 14 + "ttmL"
        )
    plan = Plan(model, Training(4096, layout.dp * 64), layout)
    for rank in estimate_memory(plan).ranks:
        found = sum(rank.parts[part] for part in STATIC)
        assert found == pytest.approx(count_static(model, layout, rank.rank), rel=1e-6), rank.rank


def estimate(model: dict[str, object], training: dict[str, object], gpus: int, **layout: object):  # type: ignore[no-untyped-def]
    plan = complete_plan(
        parse_config({"model": model, "cluster": {"gpu": "H100", "gpus": gpus}, "training": training, "layout": layout})
    )
    return estimate_memory(plan)


# Megatron's own runs, as published with their peaks: (model, training, layout, GPUs, peak in GiB, of the last rank only).
GPT = {
    "name": "GPT-7B",
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 131073,
}
PROXY = {"name": "DSV3-14L-256E"}
LATENT = {"name": "MLA-16L", "num_layers": 16, "hidden_size": 1024, "ffn_hidden_size": 4096, "moe_ffn_hidden_size": 1024}
LATENT |= {"num_experts": 32, "moe_router_topk": 4, "num_attention_heads": 32, "kv_lora_rank": 512}
LATENT |= {"moe_shared_expert_intermediate_size": 1024}
PIPE = {"tp": 1, "pp": 4, "vpp": 2, "ep": 16, "schedule": "interleaved", "flags": "layout=Ett|(tt|)*6mL;mtp=1"}
LATENT_PIPE = {"tp": 2, "pp": 2, "vpp": 4, "ep": 4, "etp": 1, "micro_batch_size": 4, "schedule": "interleaved"}
LATENT_FLAGS = "mtp=1;moe_layer_freq=([0]*1+[1]*15);dist_optimizer;sp;q_lora=1536;attention=unfused;swiglu;untied"
PUBLISHED = [
    (PROXY, {"seq_length": 2048, "global_batch_size": 256}, PIPE, 64, 67.094, False),
    (PROXY, {"seq_length": 2048, "global_batch_size": 256}, PIPE | {"recompute": "full,uniform,1"}, 64, 58.744, False),
    (
        PROXY,
        {"seq_length": 2048, "global_batch_size": 256},
        PIPE | {"recompute": "full,uniform,1", "overlap": True},
        64,
        59.1,
        False,
    ),
    (
        {"name": "Qwen3-30B-A3B"},
        {"seq_length": 4096, "global_batch_size": 1024},
        {"tp": 1, "pp": 1, "ep": 16, "overlap": True, "dispatcher": "hybridep"},
        16,
        62.166,
        False,
    ),
    (GPT, {"seq_length": 8192, "global_batch_size": 8}, {"pp": 4, "vpp": 8, "flags": "dist_optimizer;untied"}, 8, 56.551, True),
    (
        GPT,
        {"seq_length": 8192, "global_batch_size": 8},
        {"tp": 4, "micro_batch_size": 2, "flags": "dist_optimizer;untied"},
        8,
        53.219,
        True,
    ),
    (LATENT, {"seq_length": 4096, "global_batch_size": 32}, LATENT_PIPE | {"flags": LATENT_FLAGS}, 8, 55.983, True),
    (
        LATENT,
        {"seq_length": 4096, "global_batch_size": 32, "precision": "fp8"},
        LATENT_PIPE | {"flags": LATENT_FLAGS + ";fp8:tensorwise"},
        8,
        53.624,
        True,
    ),
]


@pytest.mark.parametrize(("model", "training", "layout", "gpus", "peak", "is_last"), PUBLISHED, ids=range(len(PUBLISHED)))
def test_peaks_are_within_15_percent_of_published_runs(
    model: dict[str, object], training: dict[str, object], layout: dict[str, object], gpus: int, peak: float, is_last: bool
) -> None:
    found = estimate(model, training | {"routing": "forced"}, gpus, **layout)
    rank = found.ranks[-1] if is_last else found.worst
    assert rank.peak / GIB == pytest.approx(peak, rel=0.15)
    assert rank.low <= peak * GIB <= rank.high * 1.02


# End-of-iteration memory of the last rank, in GiB.
ENDED = [
    (GPT, {"pp": 4, "vpp": 8, "flags": "dist_optimizer;untied"}, {"seq_length": 8192, "global_batch_size": 8}, 23.105),
    (
        GPT,
        {"tp": 4, "micro_batch_size": 2, "flags": "dist_optimizer;untied"},
        {"seq_length": 8192, "global_batch_size": 8},
        19.244,
    ),
    (LATENT, LATENT_PIPE | {"flags": LATENT_FLAGS}, {"seq_length": 4096, "global_batch_size": 32}, 6.177),
    (
        LATENT,
        LATENT_PIPE | {"flags": LATENT_FLAGS + ";fp8:tensorwise"},
        {"seq_length": 4096, "global_batch_size": 32, "precision": "fp8"},
        6.819,
    ),
]


@pytest.mark.parametrize(("model", "layout", "training", "ended"), ENDED, ids=range(len(ENDED)))
def test_static_memory_is_that_at_the_end_of_published_iterations(
    model: dict[str, object], layout: dict[str, object], training: dict[str, object], ended: float
) -> None:
    rank = estimate(model, training, 8, **layout).ranks[-1]
    static = (rank.static - rank.parts["buffers"]) / GIB
    assert static == pytest.approx(ended, rel=0.1)
    assert static == pytest.approx(ended, abs=1.5)


@pytest.mark.parametrize(("share", "gigabytes"), [(0, 47.2), (0.25, 43.4), (0.5, 39.6), (0.75, 35.6), (1, 32.0)])
def test_offloaded_moments_leave_the_device(share: float, gigabytes: float) -> None:
    found = estimate({"name": "Qwen3-30B-A3B"}, {}, 16, tp=2, pp=2, ep=4, optimizer_offload=share)
    assert sum(found.worst.parts[part] for part in STATIC) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def make_plan(**fields: object) -> Plan:
    layout = Layout(**{"pp": 4, "ep": 8, "dp": 8, "schedule": "1f1b"} | fields)  # type: ignore[arg-type]
    return Plan(build_model(ModelSection(name="Qwen3-30B-A3B")), Training(4096, 8 * 32), layout)


def peak(plan: Plan) -> float:
    return estimate_memory(plan).worst.peak


def test_what_saves_memory_saves_memory_in_order() -> None:
    modules = [frozenset(), frozenset({"moe_act"}), frozenset({"moe_act", "layernorm"}), frozenset({"moe", "layernorm"})]
    peaks = [peak(make_plan(recompute=Recompute("selective" if one else None, one))) for one in modules]
    peaks.append(peak(make_plan(recompute=Recompute("full", method="uniform", layers=1))))
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_the_first_rank_of_1f1b_holds_a_micro_batch_for_each_rank_and_the_last_one() -> None:
    plan = make_plan(pp=4)
    held = estimate_memory(plan)
    for rank in held.ranks:
        kept = rank.parts["activations"] + rank.parts["logits"]
        assert kept == pytest.approx((4 - rank.rank) * held.held[rank.rank].kept), rank.rank


def test_parts_sum_to_the_peak_and_the_interval_holds_it() -> None:
    for schedule, vpp in (("1f1b", 1), ("interleaved", 3), ("zbv", 2), ("dualpipev", 2), ("zb-h1", 1)):
        for rank in estimate_memory(make_plan(schedule=schedule, vpp=vpp)).ranks:
            assert sum(rank.parts.values()) == pytest.approx(rank.peak)
            assert rank.low <= rank.peak <= rank.high
            assert rank.static < rank.peak


def test_full_dualpipe_holds_two_stages_of_the_v_and_as_much_as_it() -> None:
    pair, v = (estimate_memory(make_plan(schedule=name, vpp=2)) for name in ("dualpipe", "dualpipev"))
    assert [rank.static for rank in pair.ranks] == pytest.approx([rank.static for rank in v.ranks])
    assert pair.worst.peak == pytest.approx(v.worst.peak, rel=0.1)


def test_memory_over_time_peaks_where_the_estimate_says() -> None:
    plan = make_plan(schedule="interleaved", vpp=3)
    found = estimate_memory(plan)
    timeline = simulate(build_table(plan.layout, 16), Costs())
    for rank, row in zip(found.ranks, found.follow(timeline), strict=True):
        most = max(size for _, size in row)
        assert most == pytest.approx(rank.peak - rank.parts["working"], rel=0.01)
        assert row[-1][1] == pytest.approx(rank.static, rel=1e-6)


def test_imbalance_and_clones_cost_what_they_hold() -> None:
    plan = make_plan()
    even, skewed = (estimate_memory(plan, imbalance=one).worst for one in (1.0, 1.5))
    assert skewed.parts["activations"] > even.parts["activations"]
    cloned = estimate_memory(make_plan(clones_per_rank=1)).worst
    expert = 3 * 2048 * 768
    assert cloned.parts["clones"] == 12 * expert * 6


def test_what_fits_is_said_only_below_95_percent_of_the_card() -> None:
    found = estimate_memory(make_plan())
    high = found.worst.high * found.fragmentation[1] + found.outside[1]
    low = found.worst.low * found.fragmentation[0] + found.outside[0]
    assert found.tell_fit(high / 0.95 * 1.001) is True
    assert found.tell_fit(high / 0.95 * 0.999) is None
    assert found.tell_fit(low * 0.999) is False


def test_what_is_not_stated_widens_the_interval() -> None:
    stated = {"main_grads_dtype": "fp32", "exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32", "seq_length": 4096}
    wide = estimate({"name": "Qwen3-30B-A3B"}, {}, 64, pp=4, ep=8).worst
    narrow = estimate({"name": "Qwen3-30B-A3B"}, stated, 64, pp=4, ep=8, recompute="none", micro_batch_size=1).worst
    assert wide.low < narrow.low <= narrow.high < wide.high
    assert wide.peak == narrow.peak
