"""How fast any table on a layout can be at best: a linear program over what every rank must do.

Per stage, how many of its forwards and backwards run in overlapped pairs is free (between 0 and M, as many forwards as
backwards per rank). Three things hold whatever the order:

- Work: a rank's time is its head start, its work (pairs at the overlap factor), and what it idles.
- Ends: until its first backward can start, a rank has lone forwards or idles; once the last forward of the deepest stage
  it holds has ended, the rest of the pipe must follow, during which it has lone backwards or idles.
- Memory: an activation lives while its micro-batch goes up to the last stage and back, a pair taking longer than a lone forward;
  the rank's activations, summed over time, fit under the cap times the time it has.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from counterflow.schedule.costs import Costs
from counterflow.schedule.layouts import Layout


def bound_makespan(layout: Layout, microbatches: int, costs: Costs, max_activations: float) -> float:
    """Return a makespan that no table on this layout can beat; a layout with one home a stage.

    ``max_activations`` in micro-batches of 1/P of the model. Transfers that stop the ranks only add to it.
    """
    costs = costs.spread(layout.last_stage + 1)
    way = _measure_way(layout, costs)
    ranks = [_measure_rank(layout, microbatches, costs, way, rank, max_activations) for rank in range(layout.ranks)]
    memory = _measure_memory(layout, microbatches, costs, way, ranks)
    # Between the last forward and the first backward that are possible on it, a rank can only pair; in a table shorter than
    # the two ends together it cannot even that. Which ranks are so short of time follows from the makespan: take each case, from
    # the shortest on, until one holds.
    short_of_time = sorted(ranks, key=lambda rank: -rank.both_ends)
    ends = [math.inf, *(rank.both_ends for rank in short_of_time), 0.0]
    # One micro-batch takes its way there and back, the last weight gradient and its reduction; a rank takes all its work.
    reduce = np.asarray(costs.reduce)
    obvious = float(way.end_of_f[-1] + way.end_of_i[0] + np.asarray(costs.w)[0] + reduce[0])
    # After all its work, a rank has one of its chunks to reduce yet.
    shares = (min(1.0, costs.overlap) * (rank.f_work + rank.b_work) + min(reduce[rank.held]) for rank in ranks)
    obvious = max(obvious, *(rank.head_start + float(share) for rank, share in zip(ranks, shares, strict=True)))
    for count in range(len(ranks), -1, -1):
        longest, shortest = ends[count], ends[count + 1]
        if longest > obvious and longest > shortest:
            makespan = max(_solve(microbatches, costs, short_of_time[:count], short_of_time[count:], memory), shortest)
            if makespan <= longest:
                return max(makespan, obvious)
    return obvious


def _solve(
    microbatches: int,
    costs: Costs,
    short_of_time: list["_Rank"],
    others: list["_Rank"],
    memory: list[tuple[dict[int, float], float]],
) -> float:
    """Solve the program where so many ranks are short of time."""
    program = _Program(len(np.asarray(costs.f)), microbatches)
    for rank in short_of_time:
        for stage in rank.held:
            program.require({program.paired_f(stage): -1.0}, 0.0)
            program.require({program.paired_b(stage): -1.0}, 0.0)
        program.require({program.makespan: 1.0}, rank.head_start + rank.f_work + rank.tail)
        program.require({program.makespan: 1.0}, rank.head_start + rank.head + rank.b_work)
    for rank in others:
        _require_work(program, microbatches, costs, rank)
    for row, least in memory:
        program.require(row, least)
    return program.solve()


@dataclass(frozen=True)
class _Way:
    """A lone micro-batch's way: when stage s's F starts and ends, and its I starts and ends after the last F."""

    start_of_f: np.ndarray
    end_of_f: np.ndarray
    start_of_i: np.ndarray
    end_of_i: np.ndarray


def _measure_way(layout: Layout, costs: Costs) -> _Way:
    f, i = np.asarray(costs.f), np.asarray(costs.i)
    stages = len(f)
    hop = [costs.p2p if layout.rank_of[stage] != layout.rank_of[stage + 1] else 0.0 for stage in range(stages - 1)]
    start_of_f = np.concatenate([[0.0], np.cumsum(f[:-1] + hop)])
    start_of_i = np.concatenate([np.cumsum((i[1:] + hop)[::-1])[::-1], [0.0]])
    return _Way(start_of_f, start_of_f + f, start_of_i, start_of_i + i)


class _Program:
    """Minimise the makespan; variables: it, and per stage the forwards and the backwards in pairs."""

    def __init__(self, stages: int, microbatches: int) -> None:
        self.makespan, self._stages = 0, stages
        self._bounds: list[tuple[float, float | None]] = [(0.0, None)] + [(0.0, float(microbatches))] * (2 * stages)
        self._rows: list[dict[int, float]] = []
        self._least: list[float] = []
        self._equal: list[dict[int, float]] = []

    def paired_f(self, stage: int) -> int:
        return 1 + stage

    def paired_b(self, stage: int) -> int:
        return 1 + self._stages + stage

    def add_idle(self) -> int:
        self._bounds.append((0.0, None))
        return len(self._bounds) - 1

    def require(self, row: dict[int, float], least: float) -> None:
        """Demand that the sum of the row's variables, times their factors, is at least ``least``."""
        self._rows.append(row)
        self._least.append(least)

    def require_zero(self, row: dict[int, float]) -> None:
        self._equal.append(row)

    def solve(self) -> float:
        """Return the least makespan, 0 where the solver gives up: on numbers too far apart to be added."""
        columns = len(self._bounds)
        cost = np.zeros(columns)
        cost[self.makespan] = 1.0
        result = linprog(
            cost,
            A_ub=-_fill(self._rows, columns),
            b_ub=-np.asarray(self._least),
            A_eq=_fill(self._equal, columns) if self._equal else None,
            b_eq=np.zeros(len(self._equal)) if self._equal else None,
            bounds=self._bounds,
            method="highs",
        )
        return float(result.fun) if result.status == 0 else 0.0


def _fill(rows: list[dict[int, float]], columns: int) -> np.ndarray:
    matrix = np.zeros((len(rows), columns))
    for number, row in enumerate(rows):
        for column, factor in row.items():
            matrix[number, column] = factor
    return matrix


@dataclass(frozen=True)
class _Rank:
    """What a rank has to do, and when it can: its work of forwards and backwards, one by one; its first input; how long
    from there until its first backward can start; how long from the end of its last forward to the end of the table."""

    held: list[int]
    f_work: float
    b_work: float
    head_start: float
    head: float
    tail: float
    most_forwards: int

    @property
    def both_ends(self) -> float:
        return self.head_start + self.head + self.tail


def _measure_rank(layout: Layout, microbatches: int, costs: Costs, way: _Way, rank: int, max_activations: float) -> _Rank:
    f, i, w = np.asarray(costs.f), np.asarray(costs.i), np.asarray(costs.w)
    held = list(layout.stages[rank])
    head_start, deepest = float(way.start_of_f[held[0]]), held[-1]
    return _Rank(
        held,
        f_work=microbatches * float(f[held].sum()),
        b_work=microbatches * float((i + w)[held].sum()),
        head_start=head_start,
        head=float(way.end_of_f[-1] + way.start_of_i[deepest]) - head_start,
        tail=float(way.end_of_f[-1] - way.end_of_f[deepest] + way.end_of_i[0] + w[0]),
        most_forwards=min(int(max_activations / layout.chunk_share + 1e-9), microbatches * layout.chunks),
    )


def _require_work(program: _Program, microbatches: int, costs: Costs, rank: _Rank) -> None:
    f, i, w = np.asarray(costs.f), np.asarray(costs.i), np.asarray(costs.w)
    b, gain, held = i + w, 1.0 - costs.overlap, rank.held
    program.require_zero({program.paired_f(s): 1.0 for s in held} | {program.paired_b(s): -1.0 for s in held})
    idle_head, idle_tail = program.add_idle(), program.add_idle()
    program.require({idle_head: 1.0} | {program.paired_f(s): -f[s] for s in held}, rank.head - rank.f_work)
    program.require({idle_head: 1.0}, rank.head - rank.most_forwards * max(f[s] for s in held))
    program.require({idle_tail: 1.0} | {program.paired_b(s): -b[s] for s in held}, rank.tail - rank.b_work)
    saved = {program.paired_f(s): gain * f[s] for s in held} | {program.paired_b(s): gain * b[s] for s in held}
    work = rank.head_start + rank.f_work + rank.b_work
    program.require({program.makespan: 1.0, idle_head: -1.0, idle_tail: -1.0} | saved, work)


def _measure_memory(
    layout: Layout, microbatches: int, costs: Costs, way: _Way, ranks: list[_Rank]
) -> list[tuple[dict[int, float], float]]:
    """Return, per rank, the row of the program and its least value that say that activations fit under the cap."""
    f, i, w = np.asarray(costs.f), np.asarray(costs.i), np.asarray(costs.w)
    b, share = i + w, min(1.0, costs.overlap)
    peers = [list(layout.stages[layout.rank_of[stage]]) for stage in range(len(f))]
    longer_f = costs.overlap * (f + [b[held].min() for held in peers]) - f
    longer_b = costs.overlap * (b + [f[held].min() for held in peers]) - i
    rows = []
    for rank in ranks:
        held, most_forwards = rank.held, rank.most_forwards
        # From the start of its F to the end of its I, on the shortest way, and as much longer as pairs on it take.
        least = microbatches * float((way.end_of_f[-1] - way.start_of_f[held] + way.end_of_i[held]).sum())
        passed = np.searchsorted(held, np.arange(len(f)), side="right")
        row = dict(enumerate(np.concatenate([[most_forwards], -passed * longer_f, -passed * longer_b]).tolist()))
        # Nothing lives before the rank's first input nor while the last gradients leave.
        leaving = way.end_of_i[0] - way.end_of_i[held[0]] + w[0]
        # It takes k forwards to have k activations, and k input gradients to be rid of them.
        half = (share * (rank.f_work + rank.b_work) - leaving) / 2
        missing = 0.0
        for step in (f[held].min(), i[held].min()):
            steps = min(most_forwards - 1, int(half / step)) if step and half > 0 else 0
            missing += step * (steps * most_forwards - steps * (steps + 1) / 2)
        rows.append((row, least + most_forwards * (way.start_of_f[held[0]] + leaving) + missing))
    return rows
