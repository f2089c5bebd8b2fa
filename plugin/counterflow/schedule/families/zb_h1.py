"""ZB-H1: 1F1B whose backwards are split, so that weight gradients fill the bubble.

Source: Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241, section 2.1. P ranks, M >= P micro-batches, F, I and
W per stage. Rank r has P-r live activations; the r weight gradients that it keeps back make that P, 1F1B's peak.
"""

from counterflow.schedule.families.family import Family
from counterflow.schedule.families.rows import Row, require
from counterflow.schedule.layouts import STRAIGHT, lay_straight
from counterflow.schedule.table import ScheduleTable


def build_zb_h1(ranks: int, microbatches: int) -> ScheduleTable:
    """Return ZB-H1's table: rank r runs P-1-r forwards ahead and keeps r weight gradients back until the forwards end."""
    require(ranks >= 1 and microbatches >= ranks, "zb-h1", ranks, microbatches, f"at least {ranks} micro-batches (one per rank)")
    rows = []
    for rank in range(ranks):
        row = Row()
        ahead = ranks - 1 - rank
        for _ in range(ahead):
            row.forward(rank)
        for m in range(microbatches - ahead):
            row.forward(rank)
            row.backward(rank, split=True)
            if m >= rank:
                row.weight()
        for _ in range(ahead):
            row.backward(rank, split=True)
            row.weight()
        for _ in range(min(rank, microbatches - ahead)):
            row.weight()
        rows.append(tuple(row.actions))
    return ScheduleTable("zb-h1", lay_straight(ranks), microbatches, tuple(rows))


ZB_H1 = Family(
    "zb-h1",
    build_zb_h1,
    STRAIGHT,
    splits=True,
    pairs=False,
    sizes="M >= P",
    bubble="(P-1)(F+I-W)",
    activations="P, with queued W's",
    source="arXiv 2401.10241",
    picture="""
rank 0: F0 F1       I0 W0 F2 I1 W1 I2 W2
rank 1:    F0 I0 F1 I1 W0 F2 I2 W1 W2
""",
)
