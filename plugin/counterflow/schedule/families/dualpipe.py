"""Full DualPipe: micro-batches enter at both ends and meet; DualPipeV whose two halves are cross-linked.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.1, figure 5; deepseek-ai/DualPipe. P ranks (even), P stages, each on
ranks s and P-1-s, M >= 2P micro-batches (even), F, B and W per stage, F&B an overlapped pair. The ranks of a
pair are data-parallel peers, so parameters are there twice.

Micro-batches 0..M/2-1 enter at rank 0, M/2..M-1 at rank P-1. A rank's row is the DualPipeV row of its half of the ranks: the
way there is the direction in which its own half is entered, the way back the other.
"""

from counterflow.schedule.families.dualpipev import fill_row
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.rows import Row, require
from counterflow.schedule.layouts import BIDIRECTIONAL, lay_bidirectional
from counterflow.schedule.table import ScheduleTable


def build_dualpipe(ranks: int, microbatches: int) -> ScheduleTable:
    """Return DualPipe's table, action by action DeepSeek's order; P even, M even and >= 2P."""
    fits = ranks >= 2 and ranks % 2 == 0 and microbatches >= 2 * ranks and microbatches % 2 == 0
    needs = f"an even number of ranks and of micro-batches, at least {2 * max(ranks, 2)} micro-batches (two per rank)"
    require(fits, "dualpipe", ranks, microbatches, needs)
    half, half_microbatches = ranks // 2, microbatches // 2
    rows = []
    for rank in range(ranks):
        there, back = min(rank, ranks - 1 - rank), max(rank, ranks - 1 - rank)
        late = {back: half_microbatches} if rank < half else {there: half_microbatches}
        rows.append(fill_row(Row(late), there, half, half_microbatches, there, back))
    return ScheduleTable("dualpipe", lay_bidirectional(ranks), microbatches, tuple(rows))


DUALPIPE = Family(
    "dualpipe",
    build_dualpipe,
    BIDIRECTIONAL,
    splits=True,
    pairs=True,
    sizes="P, M even, M >= 2P",
    bubble="(P/2-1)(F&B+B-3W)",
    activations="P + 1, parameters twice",
    source="arXiv 2412.19437",
    picture="""
rank 0: 0F0 1F2 0F1 1B2 (1F3;0B0) 1B3 0I1 0W1
rank 1: 0F2 1F0 0F3 1B0 (1F1;0B2) 1B1 0I3 0W3
""",
)
