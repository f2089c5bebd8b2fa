"""A table searched for the stages of a plan, under the memory that is left."""

from dataclasses import dataclass, replace

from counterflow.errors import ScheduleError
from counterflow.planner.estimate import Estimate
from counterflow.planner.layouts import build_table
from counterflow.planner.memory import GIB
from counterflow.schedule import ScheduleTable, Timeline, simulate

# Longer tables take the search more than the seconds it is given.
MOST_MICROBATCHES = 256


@dataclass(frozen=True)
class Searched:
    """A table that is faster than the plan's own, and the estimate with it; ``gap`` to the lower bound, as a share of it."""

    table: ScheduleTable
    timeline: Timeline
    estimate: Estimate
    gap: float


def search_table(estimate: Estimate, seconds: float) -> Searched | None:
    """Search a table on the plan's own layout of stages for about so many seconds; None where none is faster.

    Live activations may be those of the plan's table, times what the card's memory leaves room for.
    """
    from counterflow.schedule.search import search  # loads a compiler

    plan = estimate.plan
    if plan.layout.pp == 1 or plan.microbatches > MOST_MICROBATCHES:
        return None
    own = build_table(plan.layout, plan.microbatches)
    if any(len(homes) > 1 for homes in own.layout.homes.values()):
        return None
    costs = replace(estimate.step.costs, reduce=0.0)
    try:
        timeline = simulate(own, costs)
        cap = max(timeline.peak_activations) * find_room(estimate)
        found = search(
            plan.layout.pp, plan.microbatches, costs, max_chunks=plan.layout.vpp, max_activations=cap, seconds=seconds,
            layout=own.layout,
        )  # fmt: skip
    except ScheduleError:
        return None
    if found.timeline.makespan >= timeline.makespan:
        return None
    saved = timeline.makespan - found.timeline.makespan
    step = replace(
        estimate.step, seconds=estimate.step.seconds - saved, makespan=estimate.step.makespan - saved,
        bubble=found.timeline.bubble, causes=estimate.step.causes | {"bubble": estimate.step.causes["bubble"] - saved},
    )  # fmt: skip
    scale = step.seconds / estimate.step.seconds
    better = replace(estimate, step=step, low=estimate.low * scale, high=estimate.high * scale)
    return Searched(found.table, found.timeline, better, found.gap)


def find_room(estimate: Estimate) -> float:
    """Return how many times the activations of the plan the card has room for, at least 1."""
    worst = estimate.memory.worst
    activations = sum(size for name, size in worst.parts.items() if name.startswith("activation"))
    card = 0.95 * estimate.setting.cluster.memory_gib * GIB
    left = card - (worst.high * estimate.memory.fragmentation[1] + estimate.memory.outside[1])
    return 1.0 + max(left, 0.0) / activations if activations else 1.0
