"""Where a step's time goes, and what would change it."""

from dataclasses import dataclass, replace

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.estimate import Estimate
from counterflow.planner.layouts import Plan
from counterflow.planner.measured import change_measured
from counterflow.planner.step import Step, cost_chunks, time_step
from counterflow.planner.times import Setting


@dataclass(frozen=True)
class Bar:
    """One bar of the waterfall: seconds of a step that a cause takes, as a mean over pipeline ranks."""

    cause: str
    seconds: float


def explain_step(estimate: Estimate) -> list[Bar]:
    """Return the waterfall of a step; its bars add up to the step. What imbalance costs is a bar of its own."""
    causes = dict(estimate.step.causes)
    if estimate.setting.imbalance > 1:
        uneven, even = (
            _time_again(estimate, estimate.plan, setting).causes
            for setting in (estimate.setting, replace(estimate.setting, imbalance=1.0))
        )
        # A searched table has another bubble than the schedule of its plan.
        more = {name: min(uneven[name] - even[name], seconds) for name, seconds in causes.items()}
        causes = {name: seconds - more[name] for name, seconds in causes.items()} | {"imbalance": sum(more.values())}
    return [Bar(name, seconds) for name, seconds in causes.items() if abs(seconds) > 1e-6 * estimate.step.seconds]


def _time_again(estimate: Estimate, plan: Plan, setting: Setting) -> Step:
    """Return the step of an estimate under a change; measured costs change as the model's own do."""
    chunks = cost_chunks(plan, setting)
    costs = change_measured(estimate.step.costs, estimate.step.chunks.costs, chunks.costs) if estimate.measured else None
    return time_step(plan, setting, chunks, costs)


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
    changes = [
        _change(estimate, words, plan, other) for words, other in (("links half as fast", slow), ("10 % more imbalance", uneven))
    ]
    words, layout = "twice the nodes, the same batch", replace(plan.layout, dp=2 * plan.layout.dp)
    if plan.training.global_batch_size % (layout.dp * layout.micro_batch_size):
        return [*changes, Change(f"{words}: the batch does not divide", None, None)]
    try:
        return [*changes, _change(estimate, words, replace(plan, layout=layout), replace(setting, layout=layout))]
    except (PlanError, ScheduleError) as error:
        return [*changes, Change(f"{words}: {error}", None, None)]


def _change(estimate: Estimate, words: str, plan: Plan, setting: Setting) -> Change:
    """Return the estimate's step, taken by as much longer as that of its plan's schedule is under the change."""
    own, other = (_time_again(estimate, *one).seconds for one in ((estimate.plan, estimate.setting), (plan, setting)))
    seconds = estimate.step_s * other / own
    tokens = plan.training.global_batch_size * plan.training.seq_length
    return Change(words, seconds, tokens / seconds / plan.layout.gpus)
