"""GPipe: all forwards, then all backwards.

Source: Huang et al., GPipe, arXiv 1811.06965, section 2.3. P ranks, M micro-batches, F and B per stage.
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.rows import require
from counterflow.schedule.layouts import STRAIGHT, lay_straight
from counterflow.schedule.table import ScheduleTable


def build_gpipe(ranks: int, microbatches: int) -> ScheduleTable:
    """Return GPipe's table; any number of ranks and micro-batches."""
    require(ranks >= 1 and microbatches >= 1, "gpipe", ranks, microbatches, "at least 1 of each")
    rows = tuple(tuple(Action(kind, rank, m) for kind in "FB" for m in range(microbatches)) for rank in range(ranks))
    return ScheduleTable("gpipe", lay_straight(ranks), microbatches, rows)


GPIPE = Family(
    "gpipe",
    build_gpipe,
    STRAIGHT,
    splits=False,
    pairs=False,
    sizes="any",
    bubble="(P-1)(F+B)",
    activations="M",
    source="arXiv 1811.06965",
    picture="""
rank 0: F0 F1 F2          B0 B1 B2
rank 1:    F0 F1 F2 B0 B1 B2
""",
)
