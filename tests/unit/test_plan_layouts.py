"""Layouts: what is completed and said, what is refused, and which stage holds which layers."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import PlanError
from counterflow.planner.config import parse_config, read_config
from counterflow.planner.layouts import Layout, Plan, build_table, complete_plan, deal_layers, parse_layout, place_layers
from counterflow.planner.models import ModelShape, shape_model


def make_model(layers: int, mtp: int = 0, tied: bool = False) -> ModelShape:
    return shape_model(
        "small",
        {
            "num_layers": layers,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "vocab_size": 1000,
            "mtp_num_layers": mtp,
            "untie_embeddings_and_output_weights": not tied,
        },
    )


def complete(gpus: int = 8, model: dict[str, object] | None = None, **layout: object) -> Plan:
    return complete_plan(
        parse_config(
            {
                "model": {"name": "Mixtral-8x7B"} | (model or {}),
                "cluster": {"gpu": "H100", "gpus": gpus},
                "training": {"seq_length": 4096, "global_batch_size": 64},
                "layout": layout,
            }
        )
    )


@given(st.integers(1, 130), st.integers(1, 64), st.integers(0, 2))
def test_dealt_layers_are_read_back_and_as_even_as_can_be(layers: int, stages: int, mtp: int) -> None:
    if stages > layers + mtp + 2:
        return
    parts = parse_layout(deal_layers(layers, stages, mtp))
    assert len(parts) == stages
    assert "".join(parts) == "E" + "t" * layers + "m" * mtp + "L"
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et|(tt|)*30mL", ["Et"] + ["tt"] * 30 + ["mL"]),
        ("Et*3|(tt|)*6tmL", ["Ettt"] + ["tt"] * 6 + ["tmL"]),
        ("E,t*4|(t*4|)*2,tL", ["Etttt", "tttt", "tttt", "tL"]),
        ("Ett|m|L", ["Ett", "m", "L"]),
    ],
)
def test_a_layout_string_is_read_as_its_stages(text: str, stages: list[str]) -> None:
    assert parse_layout(text) == stages


@pytest.mark.parametrize("text", ["tt|L", "Et|x|L", "EtL|t", "E" + "t" * 10, "Et*9999|(t*9999|)*9999L"])
def test_a_layout_string_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="pipeline_model_parallel_layout"):
        parse_layout(text)


def test_placed_layers_are_all_layers_once_and_in_order() -> None:
    for layers, pp, vpp in product((8, 16, 24), (1, 2, 4), (1, 2)):
        stages = place_layers(make_model(layers), Layout(pp=pp, vpp=vpp))
        assert [number for stage in stages for number in stage.numbers] == list(range(layers))
        assert [stage.embedding for stage in stages] == [True] + [False] * (pp * vpp - 1)
        assert [stage.head for stage in stages] == [False] * (pp * vpp - 1) + [True]


def test_ends_with_numbers_of_their_own_are_split_as_megatron_splits() -> None:
    layout = Layout(pp=4, vpp=2, first_stage_layers=4, last_stage_layers=2)
    counts = [len(stage.numbers) for stage in place_layers(make_model(18), layout)]
    assert counts == [2, 3, 3, 1, 2, 3, 3, 1]


def test_embedding_and_head_count_as_layers_where_only_that_divides() -> None:
    plan = complete(gpus=16, model={"num_layers": 30}, pp=8, ep=1)
    counts = [len(stage.numbers) for stage in place_layers(plan.model, plan.layout)]
    assert counts == [3, 4, 4, 4, 4, 4, 4, 3]
    assert any("counted as layers" in note for note in plan.notes)


def test_layers_that_divide_in_no_way_are_dealt_and_it_is_said() -> None:
    plan = complete(gpus=16, model={"num_layers": 29}, pp=4, vpp=2, schedule="interleaved", ep=1)
    assert plan.layout.pipeline_layout is not None
    assert sum(len(stage.numbers) for stage in place_layers(plan.model, plan.layout)) == 29
    assert any("do not divide into 8 stages" in note for note in plan.notes)


def test_what_is_left_out_is_completed_and_said() -> None:
    plan = complete(gpus=16, pp=2)
    assert (plan.layout.tp, plan.layout.dp, plan.layout.ep, plan.microbatches) == (1, 8, 1, 8)
    assert {"tp is not stated: 1", "ep is not stated: 1", "micro_batch_size is not stated: 1"} <= set(plan.notes)
    assert {"tp", "ep", "recompute"} <= plan.unstated


@pytest.mark.parametrize(
    ("asked", "family", "chunks"),
    [("v-half", "zbv", 2), ("zero-bubble", "zb-h1", 1), ("vpp", "interleaved", 2), ("DualPipeV", "dualpipev", 2)],
)
def test_schedules_of_others_become_the_nearest_family(asked: str, family: str, chunks: int) -> None:
    plan = complete(gpus=8, pp=4, schedule=asked)
    assert (plan.layout.schedule, plan.layout.vpp) == (family, chunks)
    assert build_table(plan.layout, 16).layout.last_stage + 1 == plan.layout.stages


def test_a_table_of_full_dualpipe_spans_two_replicas() -> None:
    plan = complete(gpus=8, pp=4, schedule="dualpipe")
    table = build_table(plan.layout, 8)
    assert (table.ranks, table.layout.last_stage + 1) == (8, 8)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, "does not divide 8 GPUs"),
        ({"pp": 4, "dp": 4}, "layout.dp 4 given"),
        ({"ep": 16}, "ep 16 does not divide 8 experts"),
        ({"ep": 4, "clones_per_rank": 7}, "clones_per_rank 7 given; allowed: 0 to 6, the experts of other ranks"),
        ({"ep": 1, "clones_per_rank": 1}, "clones_per_rank 1 given; allowed: 0, since ep 1 has all experts on every rank"),
        ({"tp": 8, "ep": 8, "etp": 2}, "ep 8 x etp 2 does not divide"),
        ({"pp": 8, "vpp": 16, "schedule": "interleaved"}, "128 stages, and the model has 32 layers"),
        ({"schedule": "dualpip"}, "nearest: dualpipe"),
        ({"schedule": "zbv", "pp": 4, "vpp": 3}, "vpp 3 given"),
        ({"micro_batch_size": 5}, "global_batch_size 64 does not divide"),
        ({"cp": 8, "pipeline_model_parallel_layout": "Et*32L", "pp": 1, "vpp": 2}, "has 1 stages"),
        ({"pp": 4, "num_layers_in_first_pipeline_stage": 3}, "29 layers are left for 3 pipeline ranks"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_in_one_line(layout: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        complete(**layout)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_flags_of_published_runs_are_read() -> None:
    plan = complete(
        gpus=8,
        pp=2,
        tp=2,
        flags="mtp=1;layout=Et*16|t*16mL;sp;attention=unfused;cuda_graph=attn;paged stash;num_sms=32;fp8:tensorwise",
    )
    assert plan.model.mtp_layers == 1
    assert plan.layout.pipeline_layout == "Et*16|t*16mL"
    assert (plan.layout.sequence_parallel, plan.layout.fused_attention, plan.layout.cuda_graph) == (True, False, ("attn",))
    assert plan.training.precision == "fp8-tensorwise"
    assert [note for note in plan.notes if "not modelled" in note] == ["flag num_sms=32 is not modelled"]


def test_a_yaml_reads_like_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("model: {name: Mixtral-8x7B}\ncluster: {gpu: H100, nodes: 2}\nlayout: {pp: 2, ep: 8}\ncosts: costs.json\n")
    config = read_config(path)
    assert config.costs == tmp_path / "costs.json"
    assert complete_plan(config).layout.gpus == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "expected: keys and values"), ("a: [", "neither YAML nor JSON"), ("model: 3\ncluster: {gpu: a}", "model")],
)
def test_a_file_that_is_no_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_layout_is_a_value() -> None:
    assert replace(Layout(pp=4), tp=2) == Layout(pp=4, tp=2)


# As published tables state runs: words for flags, and little else.
PUBLISHED = [
    (
        {"name": "DSV3-14L-256E", "num_layers": 14, "hidden_size": 7168, "kv_lora_rank": 512},
        {"gpu": "H100", "gpus": 64},
        {"seq_length": 2048, "global_batch_size": 256, "precision": "bf16"},
        {
            "tp": 1,
            "pp": 4,
            "vpp": 2,
            "ep": 16,
            "recompute": "full,uniform,1",
            "flags": "layout=Ett|(tt|)*6mL;mtp=1;first_dense=?",
        },
    ),
    (
        {"name": "DeepSeek-V3", "num_layers": 61, "hidden_size": 7168},
        {"gpu": "GB300", "gpus": 256},
        {"seq_length": 4096, "global_batch_size": 4096, "precision": "mxfp8"},
        {"tp": 1, "pp": 2, "vpp": 8, "ep": 32, "flags": "mtp=1;layout=Et*4|(t*4|)*14tmL;full CUDA graph"},
    ),
    (
        {"name": "Qwen3-235B-A22B"},
        {"gpu": "H100", "gpus": 256},
        {"seq_length": 4096, "global_batch_size": 8192, "precision": "fp8_cs"},
        {"tp": 2, "pp": 8, "vpp": 4, "ep": 32},
    ),
    (
        {
            "name": "Unheard-of",
            "num_layers": 12,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_experts": 8,
            "moe_router_topk": 2,
        },
        {"gpu": "H100", "gpus": 8},
        {"seq_length": 1024},
        {
            "tp": 2,
            "pp": 1,
            "ep": 4,
            "recompute": "selective:[layernorm mla_up_proj mlp moe_act]",
            "flags": "sp;attention=unfused",
        },
    ),
]


@pytest.mark.parametrize("sections", PUBLISHED, ids=lambda sections: sections[0]["name"])
def test_runs_as_they_are_published_complete_and_have_a_table(sections: tuple[dict[str, object], ...]) -> None:
    plan = complete_plan(parse_config(dict(zip(("model", "cluster", "training", "layout"), sections, strict=True))))
    assert sum(len(stage.numbers) for stage in place_layers(plan.model, plan.layout)) == len(plan.model.layers)
    assert build_table(plan.layout, 4 * max(plan.layout.pp, 2)).ranks == plan.layout.pp
