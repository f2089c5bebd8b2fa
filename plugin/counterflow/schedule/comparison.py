"""Where a recorded step parts from its simulation, and which rank and action it parted for.

An action of a recorded step loses time in one of three ways. It *ran longer* than its cost. It *began late*: its rank was
free and its input made, and it did not run (the transfer, or time between actions). Or its *input* was *late*, and
the time was lost on another rank. Every parting names its action, and its input where that is what it waited for.

The step's end is explained by its critical path: from the last action back, each time to what ended last of the
rank's action before and the action's inputs. Along it only the first two ways occur, and what they lose there adds
up to at least what the step took longer than simulated.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import PAIR, Action, make_whole
from counterflow.schedule.costs import LEAST_OVERLAP, MOST_OVERLAP, Costs, PerStage
from counterflow.schedule.dependencies import find_input, find_result
from counterflow.schedule.reductions import drop_reductions
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import Span, Timeline

RAN_LONGER, BEGAN_LATE, INPUT_LATE = "ran longer", "began late", "input late"
# Below this share of the mean action, a difference is not worth a reader's time.
NOTEWORTHY = 0.05
Place = tuple[int, int]  # rank, position in its row


@dataclass(frozen=True, slots=True)
class Parting:
    """An action that lost ``time``, in the timelines' unit; ``cause`` is one of the three above.

    ``source`` of ``source_rank`` made the input that was there last, None where the rank itself was free last.
    """

    rank: int
    position: int
    action: Action
    cause: str
    time: float
    source: Action | None = None
    source_rank: int | None = None


@dataclass(frozen=True)
class RankDifference:
    """One rank: how much later it ended than simulated, its idle time in both, and its partings in order."""

    rank: int
    late: float
    idle: float
    simulated_idle: float
    partings: tuple[Parting, ...]

    @property
    def first(self) -> Parting | None:
        """Where the rank first parts from its simulation."""
        return self.partings[0] if self.partings else None

    @property
    def largest(self) -> Parting | None:
        """Where it loses most at once."""
        return max(self.partings, key=lambda parting: parting.time, default=None)


@dataclass(frozen=True)
class Comparison:
    """A recorded step beside its simulation; ``path`` holds what was lost along the critical path, in order of time."""

    measured: Timeline
    simulated: Timeline
    ranks: tuple[RankDifference, ...]
    path: tuple[Parting, ...]

    @property
    def ratio(self) -> float:
        """Measured over simulated makespan."""
        return self.measured.makespan / self.simulated.makespan if self.simulated.makespan else float("inf")


def fit_record(table: ScheduleTable, measured: Timeline) -> tuple[ScheduleTable, Timeline]:
    """Return table and record with the same actions in the same order on each rank.

    Where whole backwards ran in place of split ones, the record has no W: both come back with B's. Reductions run beside the
    actions and are not recorded: the table comes back without them. Raises `ScheduleError` that names the first rank and action
    that differ.
    """
    table = drop_reductions(table)
    if not any(span.action.kind == "W" for span in measured.spans):
        table = replace(table, actions=tuple(tuple(make_whole(row)) for row in table.actions))
        wholes = (make_whole([span.action]) for span in measured.spans)
        measured = replace(
            measured,
            spans=tuple(replace(span, action=next(whole)) for span, whole in zip(measured.spans, wholes, strict=True)),
        )
    if measured.ranks > table.ranks:
        raise _misfit(f"rank {measured.ranks - 1} is recorded, the table has ranks 0 to {table.ranks - 1}")
    rows = _split(measured, table.ranks)
    for rank, row in enumerate(table.actions):
        recorded = [span.action for span in rows[rank]]
        for position, (found, wanted) in enumerate(zip(recorded, row, strict=False)):
            if found != wanted:
                raise _misfit(f"rank {rank}, position {position}: {found} is recorded, the table has {wanted}")
        if len(recorded) != len(row):
            raise _misfit(f"rank {rank}: {len(recorded)} actions are recorded, the table has {len(row)}")
    return table, measured


def _misfit(what: str) -> ScheduleError:
    return ScheduleError(f"{what}: give the schedule, ranks and micro-batches that were recorded")


def estimate_costs(
    table: ScheduleTable,
    measured: Timeline,
    f: PerStage | None = None,
    i: PerStage | None = None,
    w: PerStage | None = None,
    overlap: float | None = None,
) -> Costs:
    """Return what the record's actions take, in its unit: the median of each kind on each stage. P2P is free.

    What is given stands. A stage with whole B's alone has them as its ``i``, with a ``w`` of 0; one that is recorded in pairs
    alone has the median of the others. ``overlap`` is the median pair over the sum of its parts. Raises `ScheduleError` for a
    kind that is nowhere recorded alone.
    """
    times: dict[tuple[str, int], list[float]] = {}
    for span in measured.spans:
        times.setdefault((span.action.kind, span.action.stage), []).append(span.end - span.start)
    medians = {key: statistics.median(values) for key, values in times.items() if key[0] != PAIR}
    stages = range(table.layout.last_stage + 1)
    for stage in stages:
        if ("B", stage) in medians and ("I", stage) not in medians:
            medians |= {("I", stage): medians["B", stage], ("W", stage): 0.0}
    needed = {single.kind for rank in range(table.ranks) for single in table.singles(rank)}
    named: dict[str, Any] = {
        name: value for name, value in (("f", f), ("i", i), ("w", w), ("overlap", overlap)) if value is not None
    }
    recorded: dict[str, Any] = {}
    for name, kind, users in (("f", "F", "F"), ("i", "I", "IB"), ("w", "W", "WB")):
        if not needed & set(users):
            recorded[name] = 0.0
        elif any(other == kind for other, _ in medians) or name not in named:
            recorded[name] = [_find_median(medians, kind, stage) for stage in stages]
        else:
            recorded[name] = named[name]
    costs = Costs(**recorded).spread(len(stages))
    # Against the recorded parts, not the given ones: what is slower than expected is not badly overlapped.
    pairs = [(span.end - span.start, costs.time(span.action)) for span in measured.spans if span.action.kind == PAIR]
    ratios = [length / together for length, together in pairs if together > 0]
    if ratios:
        # Costs take a pair for at most twice the sum of its parts.
        costs = replace(costs, overlap=min(MOST_OVERLAP, max(LEAST_OVERLAP, statistics.median(ratios))))
    return replace(costs, **named).spread(len(stages))


def _find_median(medians: dict[tuple[str, int], float], kind: str, stage: int) -> float:
    if (kind, stage) in medians:
        return medians[kind, stage]
    others = [value for (other, _), value in medians.items() if other == kind]
    if not others:
        raise ScheduleError(
            f"the record shows no {kind} outside a pair, so its time is not known: give --{kind.lower()} in seconds"
        )
    return statistics.median(others)


def compare(table: ScheduleTable, measured: Timeline, simulated: Timeline, p2p: float = 0.0) -> Comparison:
    """Lay a recorded step of the table over a simulated one; both hold every action (`fit_record`), in one unit.

    ``p2p`` is what the simulation allowed for a transfer: only more counts as late.
    """
    run = _Both(table, measured, simulated, p2p)
    differences = []
    for rank, row in enumerate(table.actions):
        partings = [parting for position in range(len(row)) for parting in run.find_partings((rank, position))]
        ends = [rows[rank][-1].end if rows[rank] else 0.0 for rows in (run.measured, run.simulated)]
        idle = [
            timeline.makespan - sum(span.end - span.start for span in rows[rank])
            for timeline, rows in ((measured, run.measured), (simulated, run.simulated))
        ]
        differences.append(RankDifference(rank, ends[0] - ends[1], idle[0], idle[1], tuple(partings)))
    return Comparison(measured, simulated, tuple(differences), tuple(run.walk_critical_path()))


class _Both:
    """The two timelines by rank and position, both from 0 on."""

    def __init__(self, table: ScheduleTable, measured: Timeline, simulated: Timeline, p2p: float) -> None:
        self.measured, self.simulated = (_split(timeline, table.ranks) for timeline in (measured, simulated))
        self._table, self._p2p = table, p2p
        spans = simulated.spans
        self._noteworthy = NOTEWORTHY * sum(span.end - span.start for span in spans) / max(1, len(spans))

    @cached_property
    def _maker(self) -> dict[object, tuple[Place, Action]]:
        """Which action made each result, and where it is."""
        return {
            find_result(single): ((rank, position), single)
            for rank, row in enumerate(self._table.actions)
            for position, action in enumerate(row)
            for single in action.singles()
            if find_result(single) is not None
        }

    def _find_last_input(self, place: Place) -> tuple[float, Place, Action] | None:
        """Return the input that was there last: when, and where and by which action it was made."""
        rank, position = place
        needs = (find_input(single, self._table.layout.last_stage) for single in self._table.actions[rank][position].singles())
        makers = [self._maker[need] for need in needs if need is not None]
        inputs = [
            (self.measured[maker[0]][maker[1]].end + (self._p2p if maker[0] != rank else 0.0), maker, single)
            for maker, single in makers
        ]
        return max(inputs, key=lambda found: found[0], default=None)

    def _find_waited_for(self, place: Place) -> tuple[float, tuple[Place, Action] | None]:
        """Return from when on the action could have run, and the input it had to wait for, if it was that."""
        rank, position = place
        free = self.measured[rank][position - 1].end if position else 0.0
        last = self._find_last_input(place)
        if last is None or last[0] <= free:
            return free, None
        return last[0], last[1:]

    def find_partings(self, place: Place) -> Iterator[Parting]:
        """Yield what the action lost, worth noting, in order of time."""
        rank, position = place
        span, planned = self.measured[rank][position], self.simulated[rank][position]
        ready, source = self._find_waited_for(place)
        late_before = 0.0
        if position:
            late_before = self.measured[rank][position - 1].end - self.simulated[rank][position - 1].end
        began_late = max(0.0, span.start - ready)
        input_late = span.start - planned.start - max(0.0, late_before) - began_late if source else 0.0
        names = (source[1], source[0][0]) if source else (None, None)
        if input_late > self._noteworthy:
            yield Parting(rank, position, span.action, INPUT_LATE, input_late, *names)
        if began_late > self._noteworthy:
            yield Parting(rank, position, span.action, BEGAN_LATE, began_late, *names)
        longer = (span.end - span.start) - (planned.end - planned.start)
        if longer > self._noteworthy:
            yield Parting(rank, position, span.action, RAN_LONGER, longer)

    def walk_critical_path(self) -> list[Parting]:
        """Return all that was lost, and won (below 0), along the critical path, from the first action to the last."""
        lost: list[Parting] = []
        ends = [(row[-1].end, (rank, len(row) - 1)) for rank, row in enumerate(self.measured) if row]
        place: Place | None = max(ends)[1] if ends else None
        while place is not None:
            rank, position = place
            span, planned = self.measured[rank][position], self.simulated[rank][position]
            ready, source = self._find_waited_for(place)
            names = (source[1], source[0][0]) if source else (None, None)
            longer = (span.end - span.start) - (planned.end - planned.start)
            lost.append(Parting(rank, position, span.action, RAN_LONGER, longer))
            lost.append(Parting(rank, position, span.action, BEGAN_LATE, span.start - ready, *names))
            place = source[0] if source else (rank, position - 1) if position else None
        return [parting for parting in reversed(lost) if parting.time]


def _split(timeline: Timeline, ranks: int) -> list[list[Span]]:
    """Return the spans of each rank in order, the first of all starting at 0."""
    origin = min((span.start for span in timeline.spans), default=0.0)
    rows: list[list[Span]] = [[] for _ in range(max(ranks, timeline.ranks))]
    for span in timeline.spans:
        rows[span.rank].append(replace(span, start=span.start - origin, end=span.end - origin))
    return rows
