"""A table searched for the stages of a plan, under the memory that is left."""

from dataclasses import dataclass, replace

from counterflow.errors import ScheduleError
from counterflow.planner.estimate import Estimate
from counterflow.planner.layouts import build_table
from counterflow.planner.memory import GIB, estimate_memory
from counterflow.planner.step import share_causes
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
    """Search a table on the plan's own layout of stages for about so many seconds; None where none is faster and fits.

    Live activations may be those of the plan's table, times what the card's memory leaves room for; where weight gradients that
    wait need that room, no more than those of the plan's table.
    """
    plan = estimate.plan
    if plan.layout.pp == 1 or plan.microbatches > MOST_MICROBATCHES:
        return None
    own = build_table(plan.layout, plan.microbatches)
    if any(len(homes) > 1 for homes in own.layout.homes.values()):
        return None
    timeline = simulate(own, replace(estimate.step.costs, reduce=0.0))
    caps = sorted({find_room(estimate), 1.0}, reverse=True)
    for room in caps:
        found = _search(estimate, own, timeline, room, seconds / len(caps))
        if found is not None:
            return found
    return None


def _search(estimate: Estimate, own: ScheduleTable, timeline: Timeline, room: float, seconds: float) -> Searched | None:
    from counterflow.schedule.search import search  # loads a compiler

    plan = estimate.plan
    try:
        found = search(
            plan.layout.pp, plan.microbatches, replace(estimate.step.costs, reduce=0.0), max_chunks=plan.layout.vpp,
            max_activations=room * max(timeline.peak_activations), seconds=seconds, layout=own.layout,
        )  # fmt: skip
    except ScheduleError:
        return None
    memory = estimate_memory(plan, found.table)
    fits = memory.tell_fit(estimate.setting.cluster.memory_gib * GIB)
    if found.timeline.makespan >= timeline.makespan or fits is False or (estimate.fits and not fits):
        return None
    own_step, makespan = estimate.step, found.timeline.makespan
    saved = timeline.makespan - makespan
    shares = share_causes(plan, own_step.chunks, own_step.costs, makespan, (1.0 - found.timeline.bubble) * makespan)
    shares["weight gather"] += own_step.before
    step = replace(
        own_step, seconds=own_step.seconds - saved, makespan=own_step.makespan - saved, bubble=found.timeline.bubble,
        causes=own_step.causes | shares,
    )  # fmt: skip
    scale = step.seconds / estimate.step.seconds
    better = replace(
        estimate, step=step, memory=memory, fits=fits, low=estimate.low * scale, high=estimate.high * scale
    )  # fmt: skip
    return Searched(found.table, found.timeline, better, found.gap)


def find_room(estimate: Estimate) -> float:
    """Return how many times the activations of the plan the card has room for, at least 1."""
    worst = estimate.memory.worst
    activations = sum(size for name, size in worst.parts.items() if name.startswith("activation"))
    card = 0.95 * estimate.setting.cluster.memory_gib * GIB
    left = card - (worst.high * estimate.memory.fragmentation[1] + estimate.memory.outside[1])
    return 1.0 + max(left, 0.0) / activations if activations else 1.0
