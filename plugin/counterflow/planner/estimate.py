"""An estimate of a plan: step time, memory, and what they come to."""

import math
from dataclasses import dataclass, replace
from typing import Any

from counterflow.planner.assumptions import Assumed, assume_unstated
from counterflow.planner.cluster import Cluster, build_cluster
from counterflow.planner.config import PlanConfig
from counterflow.planner.constants import Constants
from counterflow.planner.imbalance import find_imbalance
from counterflow.planner.layouts import Plan, complete_plan
from counterflow.planner.measured import apply_measured, check_measured, note_measured, read_measured
from counterflow.planner.memory import GIB, MemoryEstimate, estimate_memory
from counterflow.planner.step import ChunkCosts, Step, cost_chunks, time_step
from counterflow.planner.times import Setting
from counterflow.schedule import Costs

HOUR = 3600.0
TRILLION = 1e12


@dataclass(frozen=True)
class Estimate:
    """A plan's step and memory. ``low`` and ``high`` bound the step's seconds, as past errors of the model suggest.

    ``measured``: the costs of chunks are those of a file.
    """

    plan: Plan
    setting: Setting
    step: Step
    memory: MemoryEstimate
    fits: bool | None
    low: float
    high: float
    measured: bool = False

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.step.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens a second and GPU."""
        training = self.plan.training
        return training.global_batch_size * training.seq_length / self.step_s / self.plan.layout.gpus

    @property
    def gpu_hours(self) -> float:
        """GPU hours for a trillion tokens."""
        return TRILLION / self.tokens_per_s_per_gpu / HOUR


def estimate_config(config: PlanConfig, constants: Constants | None = None) -> Estimate:
    """Return the estimate of a plan as a user writes it; raises `PlanError` where it cannot be."""
    constants = constants or Constants()
    cluster = build_cluster(config.cluster)
    assumed = assume_unstated(config, complete_plan(config), cluster)
    if config.costs is None:
        return estimate_plan(assumed, cluster, constants)
    measured, plan = read_measured(config.costs, assumed.plan), assumed.plan
    chunks = cost_chunks(plan, make_setting(assumed, cluster, constants))
    off = check_measured(measured, chunks.costs, str(config.costs))
    notes = (*plan.notes, *note_measured(measured, str(config.costs), off))
    return estimate_plan(
        replace(assumed, plan=replace(plan, notes=notes)), cluster, constants, apply_measured(measured, chunks.costs),
        chunks=chunks,
    )  # fmt: skip


def make_setting(assumed: Assumed, cluster: Cluster, constants: Constants) -> Setting:
    """Return what the times of a plan's layers depend on."""
    plan = assumed.plan
    imbalance = find_imbalance(plan, constants)
    return Setting(
        cluster, constants, plan.layout, plan.training, imbalance, assumed.fp8_attention, assumed.fused_permute
    )  # fmt: skip


def estimate_plan(
    assumed: Assumed,
    cluster: Cluster,
    constants: Constants,
    costs: Costs | None = None,
    memory: MemoryEstimate | None = None,
    chunks: ChunkCosts | None = None,
) -> Estimate:
    """Return the estimate of a complete plan; ``costs``, as measured, take the place of the model's.

    ``memory`` and ``chunks`` are known from before.
    """
    plan = assumed.plan
    setting = make_setting(assumed, cluster, constants)
    step = time_step(plan, setting, chunks, costs)
    memory = estimate_memory(plan) if memory is None else memory
    spread = math.exp(constants.sigma)
    fits = memory.tell_fit(cluster.memory_gib * GIB)
    low, high = step.seconds / spread, step.seconds * spread
    return Estimate(plan, setting, step, memory, fits, low, high, costs is not None)


# Keys that leave a plan's memory open, and what they are when they are left out.
_OPEN = {
    "layout": ("recompute", "micro_batch_size"),
    "training": ("seq_length", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
}


def list_open(plan: Plan) -> list[str]:
    """Return the keys of a plan that would narrow the interval of its memory."""
    if plan.training.precision == "fp32":
        return [f"layout.{name}" for name in _OPEN["layout"] if name in plan.unstated]
    found = [f"{section}.{name}" for section, names in _OPEN.items() for name in names if name in plan.unstated]
    if "fp8_param_gather" in plan.unstated and plan.training.precision not in ("bf16", "fp16"):
        found.append("training.fp8_param_gather")
    return found


def describe(estimate: Estimate, price: float | None = None) -> dict[str, Any]:
    """Return an estimate as JSON has it."""
    plan = estimate.plan
    layout = plan.layout
    found: dict[str, Any] = {
        "step_s": estimate.step_s,
        "tokens_per_s_per_gpu": estimate.tokens_per_s_per_gpu,
        "bubble": estimate.step.bubble,
        "gpu_hours_per_trillion_tokens": estimate.gpu_hours,
        "memory_gib": list(estimate.memory.per_rank),
        "memory_parts": {name: [size / GIB for size in sizes] for name, sizes in estimate.memory.parts.items()},
        "fits": estimate.fits,
        "range": [estimate.low, estimate.high],
        "layout": describe_layout(plan),
        "causes_s": estimate.step.causes,
        "why": list(plan.notes),
        "narrows_memory": list_open(plan),
    }
    if price is not None:
        found["cost_per_trillion_tokens"] = estimate.gpu_hours * price
    assert layout.gpus > 0
    return found


def describe_layout(plan: Plan) -> dict[str, Any]:
    """Return a layout as a plan's YAML has it."""
    layout = plan.layout
    found: dict[str, Any] = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    found |= {
        "micro_batch_size": layout.micro_batch_size,
        "schedule": layout.schedule,
        "overlap": layout.overlap,
        "recompute": str(layout.recompute),
        "dispatcher": layout.dispatcher,
        "cuda_graph": list(layout.cuda_graph),
        "clones_per_rank": layout.clones_per_rank,
    }
    if layout.pipeline_layout is not None:
        found["pipeline_model_parallel_layout"] = layout.pipeline_layout
    return found
