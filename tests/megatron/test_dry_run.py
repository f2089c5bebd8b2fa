"""The dry run: real modules as one rank of many, against the formula, and against a training that really runs."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from counterflow.errors import PlanError
from counterflow.megatron import dry_run
from counterflow.planner.config import parse_config
from counterflow.planner.emission import emit_megatron
from counterflow.planner.layouts import Plan, complete_plan, place_layers
from counterflow.planner.memory import GIB, count_stage, estimate_memory
from tests.support import ROOT

SMALL = {
    "name": "small",
    "num_layers": 3,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "moe_layer_freq": "([0]*1+[1]*2)",
    "swiglu": True,
    "normalization": "RMSNorm",
    "vocab_size": 1000,
    "untie_embeddings_and_output_weights": True,
}


def make_plan(model: dict[str, object], gpus: int, training: dict[str, object] | None = None, **layout: object) -> Plan:
    given = {"model": model, "cluster": {"gpu": "H100", "gpus": gpus}, "layout": layout}
    return complete_plan(parse_config({**given, "training": {"seq_length": 4096, "routing": "forced"} | (training or {})}))


PLANS = [
    ({"name": "DeepSeek-V3"}, 2048, {}, {"pp": 16, "ep": 64, "schedule": "dualpipev", "recompute": "none"}),
    (
        {"name": "Qwen3-30B-A3B"},
        64,
        {"precision": "fp8-blockwise"},
        {"tp": 1, "pp": 4, "ep": 8, "recompute": "moe_act,layernorm"},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gpus", "training", "layout"), PLANS, ids=["deepseek-v3", "qwen3-fp8"])
def test_the_formula_agrees_with_the_real_modules(
    model: dict[str, object], gpus: int, training: dict[str, object], layout: dict[str, object]
) -> None:
    plan = make_plan(model, gpus, training, **layout)
    stages = place_layers(plan.model, plan.layout)
    kinds = dry_run.group_stages(stages)
    by_formula = estimate_memory(plan)
    for run in dry_run.run_stages(plan, list(kinds)):
        counted = count_stage(stages[run.stage], plan.model, plan.layout)
        # A stage of MTP alone leaves the final norm to the one before it.
        assert (run.dense, run.experts) == pytest.approx((counted.dense, counted.experts), rel=1e-5), run.stage
        assert by_formula.held[run.stage].kept == pytest.approx(run.kept, rel=0.05), run.stage


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_dry_run_counts_what_autograd_of_a_real_training_keeps(seed: int) -> None:
    plan = make_plan(SMALL, 1, {"seq_length": 256}, micro_batch_size=2, fused_attention=False)
    flags = [
        *emit_megatron(replace(plan, unstated=plan.unstated | {"routing"})),
        *dry_run.FLAGS,
        "--no-gradient-accumulation-fusion",
    ]
    job = {"flags": flags, "vocab": plan.model.pad_vocab(1), "seed": seed}
    script = ROOT / "tests" / "support" / "kept_by_training.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(job), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    real = json.loads(done.stdout.splitlines()[-1])
    assert real["loss"] == pytest.approx(math.log(1000), abs=1.0) and real["gradients"]
    (run,) = dry_run.run_stages(plan, [0], fused_rotation=False)
    assert run.kept == pytest.approx(real["kept"], rel=0.03)


@pytest.mark.slow
def test_measured_memory_has_the_shape_of_an_estimate_and_the_formulas_gradients() -> None:
    plan = make_plan(SMALL, 8, {"seq_length": 256}, pp=2, ep=2, pipeline_model_parallel_layout="Ett|tL")
    found, formula = dry_run.measure_memory(plan), estimate_memory(plan)
    assert found.per_rank == pytest.approx(formula.per_rank, rel=0.05)
    for one, other in zip(found.ranks, formula.ranks, strict=True):
        assert one.parts["gradients"] == other.parts["gradients"]
        assert one.low <= one.peak <= one.high
    assert found.worst.peak < GIB


def test_equal_stages_run_once() -> None:
    plan = make_plan({"name": "DeepSeek-V3"}, 2048, {}, pp=16, ep=64)
    kinds = dry_run.group_stages(place_layers(plan.model, plan.layout))
    assert kinds == {0: [0], 1: list(range(1, 15)), 15: [15]}


@pytest.mark.parametrize(
    ("model", "training", "layout", "message"),
    [
        ("Qwen3-Next-80B-A3B", {}, {"pp": 4}, "no linear attention"),
        ("Llama-3-8B", {"precision": "nvfp4"}, {"pp": 4}, "no kernels for precision nvfp4"),
        ("Llama-3-8B", {}, {"cp": 2}, "cp 2 given"),
        ("Llama-3-8B", {"precision": "fp8-blockwise"}, {"tp": 2}, "precision fp8-blockwise over tp 2"),
    ],
)
def test_what_cannot_run_dry_is_refused_in_one_line(
    model: str, training: dict[str, object], layout: dict[str, object], message: str
) -> None:
    with pytest.raises(PlanError, match=f"{message}.*--memory formula"):
        dry_run.measure_memory(make_plan({"name": model}, 8, training, **layout))


@pytest.mark.slow
def test_a_dry_run_that_fails_says_why_in_one_line() -> None:
    with pytest.raises(PlanError, match="the dry run failed: .*: give --memory formula") as caught:
        dry_run.run_child({"flags": ["--no-such-flag"], "world": 1, "engine": True}, "9.0")
    assert "\n" not in str(caught.value)
