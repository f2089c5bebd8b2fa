"""When each action of a table runs, given what actions cost.

A rank runs its actions in the table's order, each as soon as the rank is free and its inputs are there. That is all a
schedule's time depends on, so the result is exact for these costs; every idle span gets its reason.
"""

import bisect
from collections import deque
from dataclasses import dataclass

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import REDUCTION, Action
from counterflow.schedule.costs import Costs, spread_over
from counterflow.schedule.dependencies import Result, find_input, find_receiver, find_result
from counterflow.schedule.reductions import run_reductions
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import HELD_AFTER, Span, Timeline, Wait


@dataclass(frozen=True, slots=True)
class Made:
    """Which action made a result, on which rank, and when it was done."""

    action: Action
    rank: int
    end: float


def simulate(table: ScheduleTable, costs: Costs) -> Timeline:
    """Run the table on paper; raises `ScheduleError` where ranks wait for each other for ever.

    The table is taken to be valid otherwise (`validate`).
    """
    costs = costs.spread(table.layout.last_stage + 1)
    run = _Run(table, costs) if costs.p2p_overlaps else _StoppingRun(table, costs)
    run.finish()
    reductions = run_reductions(table, run.reductions, spread_over(costs.reduce, table.layout.last_stage + 1, "reduce"))
    makespan = max(*run.clock, *(row[-1].end for row in reductions if row), 0.0)
    for rank, end in enumerate(run.clock):
        last = reductions[rank][-1] if reductions[rank] else None
        if last is not None and last.end > end:
            run.waits.append(Wait(rank, end, last.end, None, last.action, rank))
            end = last.end
        if end < makespan:
            run.waits.append(Wait(rank, end, makespan))
    return Timeline(
        tuple(span for row in run.spans for span in row), tuple(sorted(run.waits, key=lambda w: (w.rank, w.start))),
        measure_bytes(table, costs), tuple(span for row in reductions for span in row),
    )  # fmt: skip


class _Run:
    """Transfers run beside the computation: a result is there ``p2p`` after it was made."""

    def __init__(self, table: ScheduleTable, costs: Costs) -> None:
        self.table, self.costs = table, costs
        self.clock = [0.0] * table.ranks
        self.position = [0] * table.ranks
        self.spans: list[list[Span]] = [[] for _ in range(table.ranks)]
        # Of each rank, when it came to its R's.
        self.reductions: list[list[Span]] = [[] for _ in range(table.ranks)]
        self.waits: list[Wait] = []
        self._made: dict[Result, Made] = {}
        self._waiting: dict[Result, list[int]] = {}
        self._last_stage = table.layout.last_stage

    def finish(self) -> None:
        """Run all ranks to their end; raises `ScheduleError` where they wait for each other for ever."""
        ready = deque(range(self.table.ranks))
        while ready:
            ready.extend(self.advance(ready.popleft()))
        self._require_finished()

    def advance(self, rank: int) -> list[int]:
        """Run the rank's actions until one lacks an input; return the ranks whose input was made."""
        woken: list[int] = []
        row = self.table.actions[rank]
        while self.position[rank] < len(row):
            action = row[self.position[rank]]
            inputs = [find_input(single, self._last_stage) for single in action.singles()]
            missing = next((needed for needed in inputs if needed and needed not in self._made), None)
            if missing is not None:
                self._waiting.setdefault(missing, []).append(rank)
                break
            self._start(rank, action, [self._made[needed] for needed in inputs if needed])
            for single in action.singles():
                if result := find_result(single):
                    self._made[result] = Made(single, rank, self.clock[rank])
                    woken += self._waiting.pop(result, [])
            self.position[rank] += 1
        return woken

    def _start(self, rank: int, action: Action, inputs: list[Made]) -> None:
        begin = self.clock[rank]
        start = begin
        for made in inputs:
            transfer = self.costs.p2p if made.rank != rank else 0.0
            if made.end + transfer > start:
                start, late, on_way = made.end + transfer, made, transfer
        if start > begin:
            self.waits.append(Wait(rank, begin, start, action, late.action, late.rank, min(on_way, start - begin)))
        self.clock[rank] = start
        self._run_action(rank, action)

    def _run_action(self, rank: int, action: Action) -> None:
        """An R takes the rank no time."""
        start = self.clock[rank]
        if action.kind == REDUCTION:
            self.reductions[rank].append(Span(rank, action, start, start))
            return
        self.clock[rank] += self.costs.time(action)
        self.spans[rank].append(Span(rank, action, start, self.clock[rank]))

    def _require_finished(self) -> None:
        """Raise `ScheduleError` for the first rank that could not run its whole row."""
        for rank, row in enumerate(self.table.actions):
            if self.position[rank] < len(row):
                action = row[self.position[rank]]
                inputs = (find_input(single, self._last_stage) for single in action.singles())
                missing = next(needed for needed in inputs if needed and needed not in self._made)
                raise ScheduleError(
                    f"rank {rank}, position {self.position[rank]}, action {action}: "
                    f"waits for ever for {missing}: the ranks wait for each other",
                    (rank, self.position[rank]),
                )


@dataclass(slots=True)
class _Transfer:
    """One result on its way between two ranks that both stop for it."""

    source: Action
    sender: int
    receiver: int
    offers: int = 0
    begin: float = 0.0
    end: float | None = None


class _StoppingRun(_Run):
    """Ranks stop for transfers: a transfer begins when both its ranks have stopped for it and holds both."""

    def __init__(self, table: ScheduleTable, costs: Costs) -> None:
        super().__init__(table, costs)
        self._stops = place_transfers(table)
        self._stopped = [False] * table.ranks

    def advance(self, rank: int) -> list[int]:
        """Run the rank's actions until a transfer is held up; return the ranks that were waiting for one of its."""
        woken: list[int] = []
        row = self.table.actions[rank]
        while self.position[rank] <= len(row):
            stop = self._stops[rank][self.position[rank]]
            woken += self._offer(rank, stop)
            if any(transfer.end is None for transfer in stop):
                break
            self._go_on(rank, stop, row[self.position[rank]] if self.position[rank] < len(row) else None)
            self.position[rank] += 1
            self._stopped[rank] = False
        return woken

    def _offer(self, rank: int, stop: list[_Transfer]) -> list[int]:
        """Stop for the transfers; return the other ends of those that can begin."""
        if self._stopped[rank]:
            return []
        self._stopped[rank] = True
        others: list[int] = []
        for transfer in stop:
            transfer.begin = max(transfer.begin, self.clock[rank])
            transfer.offers += 1
            if transfer.offers == 2:
                transfer.end = transfer.begin + self.costs.p2p
                others.append(transfer.receiver if rank == transfer.sender else transfer.sender)
        return others

    def _go_on(self, rank: int, stop: list[_Transfer], action: Action | None) -> None:
        begin = start = self.clock[rank]
        if stop:
            last = max(stop, key=lambda transfer: transfer.end or 0.0)
            start = max(start, last.end or 0.0)
        if start > begin:
            incoming = last.receiver == rank
            other = last.sender if incoming else last.receiver
            self.waits.append(Wait(rank, begin, start, action, last.source, other, self.costs.p2p, incoming))
        self.clock[rank] = start
        if action is not None:
            self._run_action(rank, action)


def place_transfers(table: ScheduleTable) -> list[list[list[_Transfer]]]:
    """Return what each rank moves at each stop: before each of its actions, and after the last.

    A result is sent right after its action. Its receiver stops for it where it stands when, with actions of one
    length and transfers of none, the sender does. So all stops follow one order and ranks never wait in a circle.
    """
    run = _Run(table, Costs().spread(table.layout.last_stage + 1))
    run.finish()
    starts = [sorted(span.start for span in run.spans[rank] + run.reductions[rank]) for rank in range(table.ranks)]
    stops: list[list[list[_Transfer]]] = [[[] for _ in range(len(row) + 1)] for row in table.actions]
    for span in (span for row in run.spans for span in row):
        for single in span.action.singles():
            receiver = find_receiver(table, single)
            if receiver is None or receiver == span.rank:
                continue
            transfer = _Transfer(single, span.rank, receiver)
            for rank in (span.rank, receiver):
                stops[rank][bisect.bisect_left(starts[rank], span.end)].append(transfer)
    return stops


def measure_bytes(table: ScheduleTable, costs: Costs) -> tuple[float, ...] | None:
    """Return the peak bytes of activations and queued weight gradients per rank, None where no size was given."""
    if costs.activation_bytes is None and costs.queued_bytes is None:
        return None
    stages = table.layout.last_stage + 1
    sizes = [spread_over(size or 0.0, stages, "bytes") for size in (costs.activation_bytes, costs.queued_bytes)]
    peaks = []
    for rank in range(table.ranks):
        held = peak = 0.0
        for single in table.singles(rank):
            activations, queued = HELD_AFTER[single.kind]
            held += activations * sizes[0][single.stage] + queued * sizes[1][single.stage]
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)
