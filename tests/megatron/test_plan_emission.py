"""What the planner reads and writes for Megatron is what Megatron reads."""

import contextlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.choices import complete_choice, explain_refusal, list_schedules, list_shardings, list_sizes
from counterflow.planner.cluster import build_cluster
from counterflow.planner.config import parse_config
from counterflow.planner.emission import emit_deepspeed, emit_megatron
from counterflow.planner.layouts import Plan, build_table, complete_plan, parse_layout
from counterflow.planner.models import build_model
from counterflow.platform.engine import VARIABLE
from tests.support import ROOT
from tests.support.running import run_command


@pytest.mark.parametrize("text", ["Et|(tt|)*30mL", "Et*3|(tt|)*6tmL", "E,t*4|(t*4|)*2,tL", "Ett|m|L"])
def test_a_layout_string_is_read_as_megatron_reads_it(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    upstream = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text) == ["".join(letters[one.name] for one in stage) for stage in upstream]


# The user's own flags.
OWN = "--mock-data --tokenizer-type NullTokenizer --train-iters 10 --lr 1e-4 --eval-iters 1 --transformer-impl transformer_engine"
MODELS = {
    "DeepSeek-V3": (256, [(8, 1), (8, 4), (16, 1)], (1, 2), (8, 32)),
    "Qwen3-235B-A22B": (256, [(8, 1), (8, 4), (4, 2)], (1, 2, 4), (8, 32)),
    "Qwen3-30B-A3B": (64, [(1, 1), (2, 1), (4, 3)], (1, 2), (4, 8)),
    "Mixtral-8x7B": (64, [(2, 1), (4, 2), (4, 1)], (1, 2), (2, 8)),
    "Llama-3-70B": (128, [(4, 1), (4, 5), (8, 1)], (2, 4), (1,)),
    "GPT-OSS-120B": (64, [(4, 1), (2, 3)], (1, 2), (8, 16)),
    "Qwen3-Next-80B-A3B": (64, [(4, 1), (4, 3)], (1, 2), (8, 16)),
    "GLM-4.5": (128, [(8, 1), (4, 2)], (1, 2), (8,)),
    "Kimi-K2": (512, [(16, 1), (8, 2)], (1,), (32, 64)),
}
PRECISIONS = ("bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed", "mxfp8", "nvfp4", "fp16")
RECOMPUTES = ("none", "full,uniform,1", "full,block,2", "moe_act,layernorm", "core_attn")
# What a sample has to have more of than this in one of its plans.
DRAWN = (("fsdp", 0), ("etp", 1), ("clones_per_rank", 0), ("overlap", 0))
SPLIT = ("zbv", "dualpipev", "dualpipe")


def draw_plan(draw: random.Random) -> Plan:
    """Return a plan as a search may make it."""
    name = draw.choice(list(MODELS))
    gpus, pipelines, tensors, experts = MODELS[name]
    pp, vpp = draw.choice(pipelines)
    layout = {"pp": pp, "tp": draw.choice(tensors), "ep": draw.choice(experts), "etp": 1, "recompute": draw.choice(RECOMPUTES)}
    layout |= {"dispatcher": draw.choice(["alltoall", "deepep", "hybridep"]), "overlap": draw.random() < 0.4}
    layout |= {"schedule": draw.choice(SPLIT)} if vpp == 1 and pp > 1 and draw.random() < 0.5 else {"vpp": vpp}
    layout |= {"distributed_optimizer": draw.random() < 0.9, "cuda_graph": draw.choice(["", "attn", "attn,moe_router"])}
    layout |= {"etp": draw.choice([1, layout["tp"]]), "fsdp": draw.random() < 0.2, "clones_per_rank": draw.choice([0, 0, 2])}
    training = {"seq_length": 4096, "global_batch_size": 512, "precision": draw.choice(PRECISIONS)}
    model = {"name": name}
    return complete_plan(
        parse_config({"model": model, "cluster": {"gpu": "H100", "gpus": gpus}, "training": training, "layout": layout})
    )


def ask_megatron(cases: list[dict[str, Any]]) -> list[str | None]:
    """Return why each case is refused, None where it is not: formats of blocks of 32 and 16 as on a GPU that has them."""
    is_new = [bool({"mxfp8", "nvfp4"} & set(case["flags"])) for case in cases]
    answers: list[str | None] = [None] * len(cases)
    for capability, wanted in (("9.0", False), ("10.0", True)):
        own = [number for number, new in enumerate(is_new) if new is wanted]
        if own:
            found = ask_as_gpu([cases[number] for number in own], capability)
            for number, answer in zip(own, found, strict=True):
                answers[number] = answer
    return answers


def ask_as_gpu(cases: list[dict[str, Any]], capability: str) -> list[str | None]:
    script = ROOT / "tests" / "support" / "megatron_arguments.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, VARIABLE: capability},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[str | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return answers


@pytest.mark.slow
def test_megatron_accepts_the_flags_of_fifty_plans_for_both_models() -> None:
    draw, plans = random.Random(20), []
    while len(plans) < 50:
        with contextlib.suppress(PlanError):
            plan = draw_plan(draw)
            emit_megatron(plan), emit_megatron(plan, hybrid=True)
            plans.append(plan)
    layouts = [plan.layout for plan in plans]
    assert (
        any(one.fsdp for one in layouts) and any(one.etp > 1 for one in layouts) and any(one.clones_per_rank for one in layouts)
    )
    cases = [
        {"world": plan.layout.gpus, "flags": [*emit_megatron(plan, hybrid), *OWN.split()]}
        for plan in plans
        for hybrid in (False, True)
    ]
    # What the checks say of flags that are wrong shows that they are looked at.
    piped = next(plan for plan in plans if plan.layout.pp > 1)
    cases.append({"world": piped.layout.gpus + 1, "flags": [*emit_megatron(piped), *OWN.split()]})
    cases.append({"world": piped.layout.gpus, "flags": [*emit_megatron(piped), *OWN.split(), "--no-such-flag"]})
    *answers, world, flag = ask_megatron(cases)
    refused = [(case["flags"], answer) for case, answer in zip(cases, answers, strict=False) if answer]
    assert not refused, sorted({str(answer) for _, answer in refused})
    assert world is not None and ("world size" in world or "ranks do not fit" in world)
    assert flag is not None and "no-such-flag" in flag


SEARCHED = {
    "DeepSeek-V3": ("H100", 256), "Qwen3-235B-A22B": ("GB200", 64), "Mixtral-8x7B": ("H100", 64), "Llama-3-70B": ("H100", 64),
    "Qwen3-30B-A3B": ("B200", 32),
}  # fmt: skip


def draw_searched(draw: random.Random) -> Plan:
    """Return a plan that a search tries: sizes, schedule and sharding from its own lists."""
    name, (gpu, gpus) = draw.choice(list(SEARCHED.items()))
    training = {"seq_length": 4096, "global_batch_size": 1024, "precision": "bf16", "routing": draw.choice(["forced", "natural"])}
    config = parse_config({"model": {"name": name}, "cluster": {"gpu": gpu, "gpus": gpus}, "training": training})
    cluster, model = build_cluster(config.cluster), build_model(config.model)
    fields = draw.choice(list(list_sizes(config, model, cluster, gpus)))
    fields = draw.choice(list(list_schedules(config, fields))) | draw.choice(list_shardings(config))._asdict()
    return complete_choice(config, fields, cluster, model).plan


@pytest.mark.slow
def test_megatron_and_counterflow_accept_the_flags_of_what_a_search_tries() -> None:
    draw, plans = random.Random(7), []
    while len(plans) < 50:
        with contextlib.suppress(PlanError, ScheduleError):
            plan = draw_searched(draw)
            if not explain_refusal(plan):
                build_table(plan.layout, plan.microbatches)
                plans.append(plan)
    cases = [{"world": plan.layout.gpus, "flags": [*emit_megatron(plan), *OWN.split()]} for plan in plans]
    refused = [(case["flags"], answer) for case, answer in zip(cases, ask_megatron(cases), strict=True) if answer]
    assert not refused, sorted({str(answer) for _, answer in refused})


def make_plan(**layout: object) -> Plan:
    training = {"seq_length": 4096, "global_batch_size": 512, "precision": "bf16"}
    given = {"model": {"name": "DeepSeek-V3"}, "cluster": {"gpu": "H100", "gpus": 256}, "training": training, "layout": layout}
    return complete_plan(parse_config(given))


def test_a_schedule_of_megatron_needs_no_plugin_and_others_name_theirs() -> None:
    assert not [word for word in emit_megatron(make_plan(pp=8, vpp=4, ep=32, overlap=True)) if word.startswith("--cf")]
    words = emit_megatron(make_plan(pp=8, schedule="dualpipev", ep=32, overlap=True, clones_per_rank=1))
    assert words[words.index("--cf-schedule") + 1] == "dualpipev"
    assert {"--cf-overlap", "--cf-eplb", "--cf-eplb-clones-per-rank"} <= set(words)


def test_a_hybrid_pattern_has_a_segment_for_each_stage_and_two_symbols_for_each_layer() -> None:
    words = emit_megatron(make_plan(pp=8, vpp=4, ep=32), hybrid=True)
    main, mtp = words[words.index("--hybrid-layer-pattern") + 1].split("/")
    assert main.count("|") == 31
    assert len(main.replace("|", "")) == 2 * 61
    assert main.replace("|", "").startswith("+-+-+-+E") and mtp == "+E"
    assert "--num-layers" not in words


DEEPSPEED: list[dict[str, Any]] = [
    {"pp": 8, "ep": 32},
    {"pp": 8, "ep": 32, "schedule": "dualpipev", "overlap": True},
    {"pp": 8, "ep": 8, "vpp": 4},
    {"pp": 8, "ep": 32, "schedule": "zbv", "clones_per_rank": 2, "distributed_optimizer": False},
    {"pp": 8, "ep": 32, "schedule": "dualpipe", "micro_batch_size": 2},
    {"pp": 16, "schedule": "zb-h1"},
    {"pp": 1, "ep": 32, "fsdp": True},
    {"pp": 1, "ep": 32, "clones_per_rank": 1, "optimizer_offload": 1.0},
    {"pp": 1, "ep": 32, "fsdp": True, "optimizer_offload": 0.5},
]


@pytest.mark.parametrize("layout", DEEPSPEED, ids=str)
def test_deepspeed_gets_a_json_that_it_and_the_doctor_read(
    layout: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plan = make_plan(**layout)
    given = emit_deepspeed(plan)
    # The parser knows one rank here, which has one replica.
    read = DeepSpeedConfig({**given, "train_batch_size": plan.microbatches * plan.layout.micro_batch_size})
    assert read.gradient_accumulation_steps == plan.microbatches
    assert read.train_micro_batch_size_per_gpu == plan.layout.micro_batch_size and read.bfloat16_config.enabled
    assert read.zero_config.stage == (3 if plan.layout.fsdp else int(plan.layout.distributed_optimizer))
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    code, out, err = run_command(["doctor", "--deepspeed-config", str(path)], capsys)
    assert (code, err) == (0, "") and "refused" not in out
    section = given.get("counterflow", {})
    assert ("schedule" in section) == ("schedule" in layout or layout.get("vpp", 1) > 1)
    assert section.get("eplb", {}).get("clones_per_rank", 0) == plan.layout.clones_per_rank
    if "schedule" in section:
        assert section["schedule"] in out


@pytest.mark.parametrize(("layout", "said"), [
    ({"pp": 8, "fsdp": True}, "shard no weights"), ({"pp": 1, "cp": 2}, "no context parallelism"),
    ({"pp": 1, "ep": 8, "tp": 2, "etp": 2}, "cuts no expert"), ({"pp": 8, "optimizer_offload": 0.5}, "under ZeRO-3 alone"),
])  # fmt: skip
def test_what_deepspeed_does_not_do_is_refused(layout: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        emit_deepspeed(make_plan(**layout))
    plan = make_plan(pp=8)
    with pytest.raises(PlanError, match="no precision mxfp8"):
        emit_deepspeed(replace(plan, training=replace(plan.training, precision="mxfp8")))
