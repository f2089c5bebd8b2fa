"""A table compiled for simulating it many times with other costs: `counterflow.schedule.simulate`'s makespan, without its spans.

Importing this loads the compiler.
"""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.compiling import compile_fast
from counterflow.errors import ScheduleError
from counterflow.schedule import Costs, ScheduleTable, add_reductions
from counterflow.schedule.actions import REDUCTION, Action
from counterflow.schedule.costs import spread_over
from counterflow.schedule.dependencies import find_input, find_result
from counterflow.schedule.reductions import find_peer


@dataclass(frozen=True)
class Clock:
    """The actions of a table in an order in which each comes after what it needs.

    ``before``: of each action the one before it on its rank, ``needs``: those whose results it starts from, ``far``: whether
    these come from another rank; -1 is none. ``parts``: the stages of its F, I and W, the number of stages for none.
    ``reductions``: of each rank, (the action before it, stage) of its R's in order; ``peers``: who reduces together.
    """

    ranks: int
    stages: int
    order: Array
    before: Array
    needs: Array
    far: Array
    parts: Array
    pairs: Array
    reductions: tuple[tuple[tuple[int, int], ...], ...]
    peers: tuple[int, ...]

    def run(self, costs: Costs) -> tuple[float, float]:
        """Return makespan and the sum over ranks of the time in which they compute; transfers run beside the computation."""
        costs = costs.spread(self.stages)
        f, i, w = (np.array([*_as_tuple(part), 0.0]) for part in (costs.f, costs.i, costs.w))
        durations = f[self.parts[:, 0]] + i[self.parts[:, 1]] + w[self.parts[:, 2]]
        durations[self.pairs] *= costs.overlap
        ends = np.zeros(len(durations) + 1)
        _run(self.order, self.before, self.needs, self.far, durations, costs.p2p, ends)  # type: ignore[no-untyped-call]
        return max(float(ends.max()), self._reduce(ends, spread_over(costs.reduce, self.stages, "reduce"))), float(
            durations.sum()
        )

    def _reduce(self, ends: Array, times: tuple[float, ...]) -> float:
        last = 0.0
        if not any(times):
            return last
        for rank, row in enumerate(self.reductions):
            free = 0.0
            for (mine, stage), (other, _) in zip(row, self.reductions[self.peers[rank]], strict=True):
                free = max(free, ends[mine], ends[other]) + times[stage]
            last = max(last, free)
        return float(last)


def _as_tuple(cost: object) -> tuple[float, ...]:
    assert isinstance(cost, tuple)
    return cost


@compile_fast
def _run(order, before, needs, far, durations, p2p, ends):  # type: ignore[no-untyped-def]
    for action in order:
        start = ends[before[action]]
        for side in range(2):
            need = needs[action, side]
            if need >= 0:
                ready = ends[need] + (p2p if far[action, side] else 0.0)
                start = max(start, ready)
        ends[action] = start + durations[action]


def compile_table(table: ScheduleTable) -> Clock:
    """Return a table, its reductions added, as a clock; raises `ScheduleError` where ranks wait for each other for ever."""
    table = add_reductions(table)
    stages, made = table.layout.last_stage + 1, {}
    rows: list[list[tuple[int, Action]]] = []
    reductions: list[tuple[tuple[int, int], ...]] = []
    count, rank_of = 0, []
    for rank, row in enumerate(table.actions):
        numbered: list[tuple[int, Action]] = []
        ends: list[tuple[int, int]] = []
        for action in row:
            if action.kind == REDUCTION:
                ends.append((numbered[-1][0] if numbered else -1, action.stage))
                continue
            for single in action.singles():
                result = find_result(single)
                if result is not None:
                    made[result] = count
            numbered.append((count, action))
            rank_of.append(rank)
            count += 1
        rows.append(numbered)
        reductions.append(tuple(ends))
    before, needs = np.full(count, -1), np.full((count, 2), -1)
    far, parts = np.zeros((count, 2), dtype=bool), np.full((count, 3), stages)
    pairs = np.zeros(count, dtype=bool)
    for rank, numbered in enumerate(rows):
        previous = -1
        for number, action in numbered:
            before[number], previous = previous, number
            pairs[number] = bool(action.parts)
            for side, single in enumerate(action.singles()):
                if single.kind == "F":
                    parts[number, 0] = single.stage
                if single.kind in "IB":
                    parts[number, 1] = single.stage
                if single.kind in "WB":
                    parts[number, 2] = single.stage
                need = find_input(single, stages - 1)
                if need is not None:
                    needs[number, side] = made[need]
                    far[number, side] = rank_of[made[need]] != rank
    # The entry behind the last stays 0: what a rank's first action comes after.
    order = _sort(before, needs)
    return Clock(
        table.ranks, stages, order, before, needs, far, parts, pairs, tuple(reductions),
        tuple(find_peer(table, rank) for rank in range(table.ranks)),
    )  # fmt: skip


def _sort(before: Array, needs: Array) -> Array:
    """Return the actions in an order in which each comes after what it needs."""
    order = np.empty(len(before), dtype=np.int64)
    found = _sort_fast(before, needs, order)  # type: ignore[no-untyped-call]
    if found < len(before):
        raise ScheduleError("the ranks of the table wait for each other for ever")
    return order


@compile_fast
def _sort_fast(before, needs, order):  # type: ignore[no-untyped-def]
    count = len(before)
    done = np.zeros(count, dtype=np.bool_)
    stack = np.empty(3 * count + 1, dtype=np.int64)
    open_since = np.zeros(count, dtype=np.bool_)
    found = 0
    for begin in range(count):
        stack[0], size = begin, 1
        while size > 0:
            action = stack[size - 1]
            if done[action]:
                size -= 1
                continue
            grown = False
            for need in (before[action], needs[action, 0], needs[action, 1]):
                if need >= 0 and not done[need]:
                    if open_since[need]:
                        return found
                    stack[size] = need
                    size += 1
                    grown = True
                    break
            if grown:
                open_since[action] = True
                continue
            done[action] = True
            open_since[action] = False
            order[found] = action
            found += 1
            size -= 1
    return found
