"""DualPipeV: every rank holds a stage of the way there and one of the way back, and runs the forward of one
beside the backward of the other.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.1, cut in half; deepseek-ai/DualPipe. P ranks, two stages a rank (V),
M >= 2P micro-batches, F, B and W per chunk, F&B an overlapped pair. The DualPipe README counts PP = 2P
stages and writes the bubble (PP/2-1)(F&B + B - 3W).

In the steps below ``there`` and ``back`` are the rank's two stages.
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.rows import Row, require
from counterflow.schedule.layouts import V, lay_v
from counterflow.schedule.table import ScheduleTable


def build_dualpipev(ranks: int, microbatches: int) -> ScheduleTable:
    """Return DualPipeV's table, action by action DeepSeek's order; M >= 2P."""
    fits = ranks >= 1 and microbatches >= 2 * ranks
    require(fits, "dualpipev", ranks, microbatches, f"at least {2 * ranks} micro-batches (two per rank)")
    layout = lay_v(ranks)
    rows = tuple(fill_row(Row(), rank, ranks, microbatches, *layout.stages[rank]) for rank in range(ranks))
    return ScheduleTable("dualpipev", layout, microbatches, rows)


def fill_row(row: Row, rank: int, ranks: int, microbatches: int, there: int, back: int) -> tuple[Action, ...]:
    """Return a rank's row: the eight steps of DeepSeek's published schedule."""
    # Step 1: F there
    for _ in range((ranks - rank - 1) * 2):
        row.forward(there)
    # Step 2: F there, F back
    for _ in range(rank + 1):
        row.forward(there)
        row.forward(back)
    # Step 3: I back, W, F back (zero bubble)
    for _ in range(ranks - rank - 1):
        row.backward(back, split=True)
        row.weight()
        row.forward(back)
    # Step 4, the steady state: F there & B back, F back & B there
    for i in range(microbatches - ranks * 2 + rank + 1):
        if i == 0 and rank == ranks - 1:
            # The last rank would wait for its own turn: not overlapped, for a smaller bubble.
            row.forward(there)
            row.backward(back)
        else:
            row.overlap(there, back)
        row.overlap(back, there)
    # Step 5: B back, F back & B there
    for _ in range(ranks - rank - 1):
        row.backward(back)
        row.overlap(back, there)
    # Step 6: B back, B there; the second half is split (zero bubble)
    half = (rank + 1) // 2
    for i in range(rank + 1):
        row.backward(back, split=i > half or (i == half and rank % 2 == 1))
        row.backward(there, split=i >= half)
    # Step 7: W, I there
    for _ in range(ranks - rank - 1):
        row.weight()
        row.backward(there, split=True)
    # Step 8: W
    for _ in range(rank + 1):
        row.weight()
    return tuple(row.actions)


DUALPIPEV = Family(
    "dualpipev",
    build_dualpipev,
    V,
    splits=True,
    pairs=True,
    sizes="M >= 2P",
    bubble="(P-1)(F&B+B-3W)",
    activations="P + 1/2",
    source="arXiv 2412.19437",
    picture="""
rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1) (3F2;0B0) ...
rank 1:     1F0 2F0 1F1 2F1 1F2 2B0 (2F2;1B0) ...
""",
)
