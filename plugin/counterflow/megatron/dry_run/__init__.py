"""Memory by dry run: Megatron's own model code runs as one rank of many, without its data, and what autograd keeps is counted.

The run is a process of its own (`counterflow.megatron.dry_run.child`), since it changes Megatron. Each different stage of a plan
runs once. Gradients, optimizer state, what is only there while an action runs, and the allowances are the formula's
(`counterflow.planner.memory`).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

from counterflow.errors import PlanError
from counterflow.planner.emission import emit_megatron
from counterflow.planner.layouts import PLAIN_LOOPED, PLAIN_STRAIGHT, Layout, Plan, Stage, place_layers
from counterflow.planner.memory import Measured, MemoryEstimate, Parameters, choose_imbalance, count_stage, estimate_memory
from counterflow.schedule.table import ScheduleTable

LIMIT_SECONDS = 300.0
# What the user would add: data that is not read, and the parts that are CUDA kernels switched off.
FLAGS = """
    --mock-data --tokenizer-type NullTokenizer --train-iters 1 --lr 1e-4 --eval-iters 1 --use-cpu-initialization
    --transformer-impl transformer_engine --no-rope-fusion --no-bias-dropout-fusion
""".split()
BLACKWELL = ("mxfp8",)
# Formats whose data and scales are gathered in one call, which fake tensors do not know.
GATHERED_TOGETHER = ("fp8-blockwise", "mxfp8")


@dataclass(frozen=True)
class StageRun:
    """What one stage was found to hold on its rank: numbers of parameters, and bytes that a micro-batch keeps."""

    stage: int
    dense: int
    experts: int
    kept: int
    seconds: float


def measure_memory(plan: Plan, table: ScheduleTable | None = None, imbalance: float | None = None) -> MemoryEstimate:
    """Return the memory of every pipeline rank with parameters and activations of the real modules.

    Takes some 10 s and 1 GB. Raises `PlanError` for a model that Megatron cannot be run for here.
    """
    stages = place_layers(plan.model, plan.layout)
    kinds = group_stages(stages)
    likely = choose_imbalance(plan, imbalance)[1]
    runs = {run.stage: run for run in run_stages(plan, list(kinds), likely)}
    measured: dict[int, Measured] = {}
    for first, alike in kinds.items():
        run, linear = runs[first], count_stage(stages[first], plan.model, plan.layout).linear
        found = Measured(Parameters(run.dense, run.experts, linear), run.kept)
        measured |= dict.fromkeys(alike, found)
    return estimate_memory(plan, table, imbalance, measured)


def group_stages(stages: tuple[Stage, ...]) -> dict[int, list[int]]:
    """Return stages that hold the same, by the first of each."""
    found: dict[Any, list[int]] = {}
    for index, stage in enumerate(stages):
        key = (tuple(map(id, stage.layers)), stage.embedding, stage.head, stage.mtp)
        found.setdefault(key, []).append(index)
    return {alike[0]: alike for alike in found.values()}


def run_stages(plan: Plan, stages: list[int], imbalance: float = 1.0, fused_rotation: bool = True) -> list[StageRun]:
    """Run stages of a plan, each as a rank that holds it in Megatron's own layout; raises `PlanError` where one cannot run."""
    check_runnable(plan)
    layout = plan.layout
    job = {
        "flags": [*emit_megatron(replace(plan, layout=simplify(layout))), *FLAGS],
        "world": layout.gpus,
        "vocab": plan.model.pad_vocab(layout.tp),
        "engine": True,
        "imbalance": imbalance,
        "fused_rotation": fused_rotation,
        "fused_attention": layout.fused_attention,
        "stages": [[stage, stage % layout.pp * (layout.gpus // layout.pp)] for stage in stages],
    }
    return [StageRun(**one) for one in run_child(job, "10.0" if plan.training.precision in BLACKWELL else "9.0")]


def simplify(layout: Layout) -> Layout:
    """Return a layout in which Megatron builds the same stages without the plugin, and exchanges tokens in plain torch."""
    schedule = PLAIN_LOOPED if layout.vpp > 1 else PLAIN_STRAIGHT
    return replace(
        layout, schedule=schedule, dispatcher="alltoall", overlap=False, cuda_graph=(), clones_per_rank=0, optimizer_offload=0.0,
        activation_offload_layers=0, paged_stash=False, fsdp=False,
    )  # fmt: skip


def check_runnable(plan: Plan) -> None:
    """Raise `PlanError` for what the dry run has no code of Megatron for."""
    change = "give --memory formula"
    if plan.training.precision == "nvfp4":
        raise PlanError(f"a dry run has no kernels for precision nvfp4: {change}")
    if plan.training.precision in GATHERED_TOGETHER and plan.layout.sequence_parallel:
        raise PlanError(f"a dry run cannot gather precision {plan.training.precision} over tp {plan.layout.tp}: {change}")


def run_child(job: dict[str, Any], capability: str) -> list[dict[str, Any]]:
    """Run the dry run's process; raises `PlanError` with its last word where it fails."""
    environment = {**os.environ, "COUNTERFLOW_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "counterflow.megatron.dry_run.child"]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=LIMIT_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise PlanError(f"the dry run took more than {LIMIT_SECONDS:.0f} s and was ended: give --memory formula") from None
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        raise PlanError(f"the dry run failed: {words[-1].split(']: ')[-1].strip()[:300]}: give --memory formula")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
