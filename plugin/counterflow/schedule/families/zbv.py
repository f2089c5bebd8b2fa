"""ZB-V: a V without bubble where F = I = W, at 1F1B's memory.

Source: Qi et al., Pipeline Parallelism with Controllable Memory, arXiv 2405.15362, section 4.2 (V-ZB); zero bubble from arXiv
2401.10241. P ranks, two stages a rank (V), F, I and W per chunk.
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.rows import require
from counterflow.schedule.layouts import V, lay_v
from counterflow.schedule.table import ScheduleTable


def build_zbv(ranks: int, microbatches: int) -> ScheduleTable:
    """Return ZB-V's table; with fewer than 2P-1 micro-batches it is that of 2P-1 without the others."""
    require(ranks >= 1 and microbatches >= 1, "zbv", ranks, microbatches, "at least 1 of each")
    layout = lay_v(ranks)
    rows = tuple(tuple(_fill_row(rank, ranks, microbatches, *layout.stages[rank])) for rank in range(ranks))
    return ScheduleTable("zbv", layout, microbatches, rows)


def _fill_row(rank: int, ranks: int, microbatches: int, there: int, back: int) -> list[Action]:
    # Per stage, how many F, I and W have been placed: the next one's micro-batch.
    placed = dict.fromkeys(((kind, stage) for kind in "FIW" for stage in (there, back)), 0)
    row: list[Action] = []

    def place(times: int, *steps: tuple[str, int]) -> None:
        """Place the steps, one after the other, so many times; those of micro-batches that there are not are only counted."""
        useful = min(times, max(0, microbatches - min(placed[step] for step in steps)))
        for _ in range(useful):
            for step in steps:
                if placed[step] < microbatches:
                    row.append(Action(*step, placed[step]))
                placed[step] += 1
        for step in steps:
            placed[step] += times - useful

    # Fill: until the rank's first backward can start, forwards of the way there, later of both ways.
    place(2 * (ranks - rank) - 1, ("F", there))
    place(rank, ("F", back), ("F", there))
    place(ranks - rank, ("F", back), ("I", back), ("W", back))
    # Steady: F, I and W of the way there, then of the way back.
    steady = max(microbatches, 2 * ranks - 1) - placed["F", back]
    place(steady, *((kind, stage) for stage in (there, back) for kind in "FIW"))
    # Drain: input gradients first, since other ranks wait for them; weight gradients fill the rest.
    place(rank, ("I", there), ("I", back))
    place(ranks - rank, ("I", there), ("W", there))
    for stage in (back, there):
        place(placed["I", stage] - placed["W", stage], ("W", stage))
    return row


ZBV = Family(
    "zbv",
    build_zbv,
    V,
    splits=True,
    pairs=False,
    sizes="any",
    bubble="(P-1)F where F = I = W",
    activations="P",
    source="arXiv 2405.15362",
    picture="""
rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 ...
rank 1:     1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 ...
""",
)
