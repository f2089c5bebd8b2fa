"""Forwards alone, for evaluation, on any layout; in a bidirectional one each direction's as if it were alone.

::

    rank 0: 0F0 0F1 0F2 3F0 0F3 3F1     deep stages first, so that what is nearly done leaves
    rank 1:     1F0 2F0 1F1 2F1
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.layouts import Layout
from counterflow.schedule.table import ScheduleTable


def build_forward_only(layout: Layout, microbatches: int) -> ScheduleTable:
    """Return the forwards of a layout: ordered by the tick stage + micro-batch, deep stages first.

    A stage of two homes runs half of the (even number of) micro-batches on each, the second half's ticks counted from its own
    first: mirrored ranks run the same stages in the same order.
    """
    rows = []
    for rank, stages in enumerate(layout.stages):
        ticks = []
        for stage in stages:
            homes = layout.homes[stage]
            own = microbatches // len(homes)
            first = homes.index(rank) * own
            ticks += [(stage + m, -stage, Action("F", stage, first + m)) for m in range(own)]
        rows.append(tuple(action for *_, action in sorted(ticks, key=lambda tick: tick[:2])))
    return ScheduleTable("forward-only", layout, microbatches, tuple(rows))
