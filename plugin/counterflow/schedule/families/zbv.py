"""ZB-V: a V without bubble where F = I = W, at 1F1B's memory.

Source: Qi et al., Pipeline Parallelism with Controllable Memory, arXiv 2405.15362, section 4.2 (V-ZB); zero bubble from arXiv
2401.10241. P ranks, two stages a rank (V), F, I and W per chunk.

- bubble per rank: (P-1)F where F = I = W: the time until the last rank has its first input
- live activations: P micro-batches on every rank

::

    rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 ...
    rank 1:     1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 ...
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.families.rows import require
from counterflow.schedule.layouts import lay_v
from counterflow.schedule.table import ScheduleTable


def build_zbv(ranks: int, microbatches: int) -> ScheduleTable:
    """Return ZB-V's table; with fewer than 2P-1 micro-batches it is that of 2P-1 without the others."""
    require(ranks >= 1 and microbatches >= 1, "zbv", ranks, microbatches, "at least 1 of each")
    layout = lay_v(ranks)
    full = max(microbatches, 2 * ranks - 1)
    rows = []
    for rank in range(ranks):
        row = _fill_row(rank, ranks, full, *layout.stages[rank])
        rows.append(tuple(action for action in row if action.microbatch < microbatches))
    return ScheduleTable("zbv", layout, microbatches, tuple(rows))


def _fill_row(rank: int, ranks: int, microbatches: int, there: int, back: int) -> list[Action]:
    # Per stage, how many F, I and W have been placed: the next one's micro-batch.
    placed = dict.fromkeys(((kind, stage) for kind in "FIW" for stage in (there, back)), 0)
    row: list[Action] = []

    def place(kind: str, stage: int) -> None:
        row.append(Action(kind, stage, placed[kind, stage]))
        placed[kind, stage] += 1

    # Fill: until the rank's first backward can start, forwards of the way there, later of both ways.
    for _ in range(2 * (ranks - rank) - 1):
        place("F", there)
    for _ in range(rank):
        place("F", back)
        place("F", there)
    for _ in range(ranks - rank):
        place("F", back)
        place("I", back)
        place("W", back)
    # Steady: F, I and W of the way there, then of the way back.
    while placed["F", back] < microbatches:
        for stage in (there, back):
            if placed["F", stage] < microbatches:
                place("F", stage)
            place("I", stage)
            place("W", stage)
    # Drain: input gradients first, since other ranks wait for them; weight gradients fill the rest.
    for _ in range(rank):
        place("I", there)
        place("I", back)
    for _ in range(ranks - rank):
        place("I", there)
        place("W", there)
    for stage in (back, there):
        while placed["W", stage] < placed["I", stage]:
            place("W", stage)
    return row
