"""Gradient reductions in a table: where they are written, and when they run.

An R stands where the reduction of a chunk's gradients is started. It takes the rank no time: the collective runs beside what the
rank computes, after the rank's reductions before it. A step ends when all actions and all reductions have ended. With whom a
rank reduces is not in the table: data-parallel pipelines run the same table at the same time. In the bidirectional layout
ranks r and P-1-r hold the same stages and reduce together, so each of their reductions waits until both have come to it.
"""

from dataclasses import replace
from itertools import accumulate

from counterflow.schedule.actions import REDUCTION, Action
from counterflow.schedule.layouts import BIDIRECTIONAL
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import Span


def add_reductions(table: ScheduleTable) -> ScheduleTable:
    """Return the table with an R of every chunk after its last B or W on the rank; a table that has R's as it is.

    Of two ranks that reduce together, the second takes the order of the first, later where it has to.
    """
    if any(action.kind == REDUCTION for row in table.actions for action in row):
        return table
    rows = []
    for rank, row in enumerate(table.actions):
        last = _find_last_gradients(row)
        order = sorted(last, key=_find_last_gradients(table.actions[min(rank, find_peer(table, rank))]).__getitem__)
        due: dict[int, list[Action]] = {}
        for n, stage in zip(accumulate(map(last.__getitem__, order), max), order, strict=True):
            due.setdefault(n, []).append(Action(REDUCTION, stage))
        rows.append(tuple(one for n, action in enumerate(row) for one in (action, *due.get(n, ()))))
    return replace(table, actions=tuple(rows))


def _find_last_gradients(row: tuple[Action, ...]) -> dict[int, int]:
    """Return the position of each stage's last B or W in a row."""
    return {single.stage: n for n, action in enumerate(row) for single in action.singles() if single.kind in "BW"}


def drop_reductions(table: ScheduleTable) -> ScheduleTable:
    """Return the table without its R's."""
    rows = (tuple(action for action in row if action.kind != REDUCTION) for row in table.actions)
    return replace(table, actions=tuple(rows))


def find_peer(table: ScheduleTable, rank: int) -> int:
    """Return the rank of the table that reduces together with ``rank``; itself where there is none."""
    return table.ranks - 1 - rank if table.layout.name == BIDIRECTIONAL else rank


def run_reductions(table: ScheduleTable, started: list[list[Span]], times: tuple[float, ...]) -> list[list[Span]]:
    """Return when each rank's reductions run, given when the rank came to each (``started``), and the time per stage."""
    ran: list[list[Span]] = []
    for rank, row in enumerate(started):
        free, spans = 0.0, []
        for mine, other in zip(row, started[find_peer(table, rank)], strict=True):
            start = max(free, mine.start, other.start)
            free = start + times[mine.action.stage]
            spans.append(replace(mine, start=start, end=free))
        ran.append(spans)
    return ran
