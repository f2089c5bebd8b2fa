"""Where a step's time goes, and what would change it."""

from dataclasses import dataclass, replace

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.assumptions import Assumed
from counterflow.planner.estimate import Estimate, estimate_plan
from counterflow.planner.step import time_step


@dataclass(frozen=True)
class Bar:
    """One bar of the waterfall: seconds of a step that a cause takes, as a mean over pipeline ranks."""

    cause: str
    seconds: float


def explain_step(estimate: Estimate) -> list[Bar]:
    """Return the waterfall of a step; its bars add up to the step. What imbalance costs is a bar of its own."""
    causes = dict(estimate.step.causes)
    if estimate.setting.imbalance > 1:
        even = time_step(estimate.plan, replace(estimate.setting, imbalance=1.0))
        imbalance = estimate.step.seconds - even.seconds
        causes = {**even.causes, "imbalance": imbalance}
    return [Bar(name, seconds) for name, seconds in causes.items() if abs(seconds) > 1e-6 * estimate.step.seconds]


@dataclass(frozen=True)
class Change:
    """What a step takes if something about the cluster or the run were different."""

    words: str
    seconds: float | None
    tokens_per_s_per_gpu: float | None


def try_changes(estimate: Estimate) -> list[Change]:
    """Return the step with links half as fast, 10 % more imbalance, and twice the nodes at the same batch."""
    plan, setting = estimate.plan, estimate.setting
    cluster = setting.cluster
    slow = replace(setting, cluster=replace(cluster, nvlink=cluster.nvlink / 2, network=cluster.network / 2))
    uneven = replace(setting, imbalance=setting.imbalance * 1.1)
    changes = []
    for words, other in (("links half as fast", slow), ("10 % more imbalance", uneven)):
        seconds = time_step(plan, other).seconds
        changes.append(Change(words, seconds, estimate.tokens_per_s_per_gpu * estimate.step_s / seconds))
    changes.append(_double(estimate))
    return changes


def _double(estimate: Estimate) -> Change:
    plan = estimate.plan
    words = "twice the nodes, the same batch"
    layout = replace(plan.layout, dp=2 * plan.layout.dp)
    if plan.training.global_batch_size % (layout.dp * layout.micro_batch_size):
        return Change(f"{words}: the batch does not divide", None, None)
    assumed = Assumed(replace(plan, layout=layout), estimate.setting.fp8_attention, estimate.setting.fused_permute)
    try:
        other = estimate_plan(assumed, estimate.setting.cluster, estimate.setting.constants)
    except (PlanError, ScheduleError) as error:
        return Change(f"{words}: {error}", None, None)
    return Change(words, other.step_s, other.tokens_per_s_per_gpu)
