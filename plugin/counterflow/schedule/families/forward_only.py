"""Forwards alone, for evaluation, on any layout.

::

    rank 0: 0F0 0F1 0F2 3F0 0F3 3F1     deep stages first, so that what is nearly done leaves
    rank 1:     1F0 2F0 1F1 2F1
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.layouts import Layout
from counterflow.schedule.table import ScheduleTable


def build_forward_only(layout: Layout, microbatches: int) -> ScheduleTable:
    """Return the forwards of a layout with one home a stage: ordered by the tick stage + micro-batch, deep stages first."""
    rows = []
    for stages in layout.stages:
        forwards = [Action("F", stage, m) for stage in stages for m in range(microbatches)]
        rows.append(tuple(sorted(forwards, key=lambda a: (a.stage + a.microbatch, -a.stage))))
    return ScheduleTable("forward-only", layout, microbatches, tuple(rows))
