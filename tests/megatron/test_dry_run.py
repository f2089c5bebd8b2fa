"""The dry run: real modules as one rank of many, against the formula, and against a training that really runs."""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow.errors import PlanError
from counterflow.megatron import dry_run
from counterflow.planner.config import parse_config
from counterflow.planner.emission import emit_megatron
from counterflow.planner.layouts import Plan, complete_plan, place_layers
from counterflow.planner.memory import GIB, count_stage, estimate_memory
from tests.support import ROOT
from tests.support.forked_ranks import run_ranks

# How far apart what a stage keeps may be, by formula and by the real modules.
CLOSE = 0.03
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


DEEPSEEK = {"name": "DeepSeek-V3", "num_layers": 8, "moe_layer_freq": "([0]*3+[1]*5)"}
LATENT = {"name": "DeepSeek-V2-Lite", "num_layers": 4}
GROUPED = {"name": "Qwen3-30B-A3B", "num_layers": 4}
DENSE = {"name": "Llama-3-70B", "num_layers": 4}
GATED = {"name": "Qwen2-57B-A14B", "num_layers": 4}
LINEAR = {"name": "Qwen3-Next-80B-A3B", "num_layers": 8}
UNEVEN = {"pp": 4, "ep": 8, "pipeline_model_parallel_layout": "Et|ttt|ttt|tmL", "recompute": "none"}
BARE = {"pp": 2, "ep": 8, "recompute": "none"}
# Model, training, layout: what the formula and the real modules have to agree on, at real widths with few layers.
AGREEING: dict[str, tuple[dict[str, object], dict[str, object], dict[str, object]]] = {
    "mla, mtp, uneven stages": (DEEPSEEK, {}, UNEVEN),
    "mtp on a stage of its own": (DEEPSEEK, {}, UNEVEN | {"pipeline_model_parallel_layout": "Ett|ttt|ttt|mL"}),
    "mla, fp8, tensor parallel": (DEEPSEEK, {"precision": "fp8-tensorwise"}, UNEVEN | {"tp": 2}),
    "mla, mxfp8": (DEEPSEEK, {"precision": "mxfp8"}, UNEVEN | {"recompute": "moe_act"}),
    "full recomputation": (DEEPSEEK, {}, UNEVEN | {"recompute": "full"}),
    "full recomputation of a block, not of mtp": (DEEPSEEK, {}, UNEVEN | {"recompute": "full,block,1"}),
    "recomputed mla, experts, feed-forwards, norms": (DEEPSEEK, {}, UNEVEN | {"recompute": "mla_up_proj,moe,mlp,layernorm"}),
    "recomputed activation and shared experts": (DEEPSEEK, {}, UNEVEN | {"recompute": "moe_act,shared_experts"}),
    "mla without a query's rank": (LATENT, {}, BARE),
    "gqa, tensor and expert tensor parallel": (GROUPED, {}, BARE | {"tp": 2, "etp": 2, "ep": 4}),
    "gqa, blockwise fp8": (GROUPED, {"precision": "fp8-blockwise"}, BARE),
    "fp32": (GROUPED, {"precision": "fp32"}, BARE),
    "attention without a fused kernel": (GROUPED, {}, BARE | {"fused_attention": False}),
    "dense, tied, ends of their own": (
        DENSE | {"untie_embeddings_and_output_weights": False},
        {},
        {"tp": 4, "pp": 4, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1, "recompute": "none"},
    ),
    "dense, recomputed, no sequence parallelism": (DENSE, {}, {"tp": 4, "pp": 4, "recompute": "mlp", "sequence_parallel": False}),
    "biases and learned positions": ({"name": "GPT3-175B", "num_layers": 4}, {"seq_length": 2048}, {"tp": 8, "pp": 4}),
    "windows, sinks, biases of experts": ({"name": "GPT-OSS-20B", "num_layers": 4}, {}, BARE),
    "gate of shared experts": (GATED, {}, BARE | {"tp": 2}),
    "linear attention": (LINEAR, {}, BARE | {"tp": 2}),
    "context parallel": (LINEAR, {"seq_length": 16384}, BARE | {"cp": 4}),
}


def run_forked(job: dict[str, object], capability: str) -> list[dict[str, object]]:
    """Take the place of `dry_run.run_child`: the same in a process that need not import Megatron again."""
    with tempfile.TemporaryDirectory() as folder:
        (out,) = run_ranks("tests.support.dry_worker", job, 1, Path(folder) / "logs", capability=capability)
    found: list[dict[str, object]] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("model", "training", "layout"), AGREEING.values(), ids=list(AGREEING))
def test_the_formula_agrees_with_the_real_modules(
    model: dict[str, object], training: dict[str, object], layout: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "run_child", run_forked)
    plan = make_plan(model, 64, training, **layout)
    stages = place_layers(plan.model, plan.layout)
    by_formula = estimate_memory(plan)
    for run in dry_run.run_stages(plan, list(dry_run.group_stages(stages))):
        counted = count_stage(stages[run.stage], plan.model, plan.layout)
        assert (run.dense, run.experts) == (counted.dense, counted.experts), run.stage
        assert by_formula.held[run.stage].kept == pytest.approx(run.kept, rel=CLOSE), run.stage


@pytest.mark.slow
def test_every_stage_of_a_large_model_agrees() -> None:
    plan = make_plan({"name": "DeepSeek-V3"}, 2048, pp=16, ep=64, schedule="dualpipev", recompute="none")
    by_formula, found = estimate_memory(plan), dry_run.measure_memory(plan)
    assert found.per_rank == pytest.approx(by_formula.per_rank, rel=0.01)


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
        ("Llama-3-8B", {"precision": "nvfp4"}, {"pp": 4}, "no kernels for precision nvfp4"),
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
