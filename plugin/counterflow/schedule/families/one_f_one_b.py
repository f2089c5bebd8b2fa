"""1F1B: one forward, one backward, so that activations stop growing.

Source: PipeDream-Flush, Narayanan et al., arXiv 2006.09503; Megatron-LM, arXiv 2104.04473, section 2.2.1.
P ranks, M micro-batches, F and B per stage.
"""

from counterflow.schedule.actions import Action
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.rows import require
from counterflow.schedule.layouts import STRAIGHT, lay_straight
from counterflow.schedule.table import ScheduleTable


def build_1f1b(ranks: int, microbatches: int) -> ScheduleTable:
    """Return 1F1B's table: rank r runs P-1-r forwards ahead, then alternates; any number of ranks and micro-batches."""
    require(ranks >= 1 and microbatches >= 1, "1f1b", ranks, microbatches, "at least 1 of each")
    rows = []
    for rank in range(ranks):
        warmup = min(ranks - 1 - rank, microbatches)
        forwards = [Action("F", rank, m) for m in range(microbatches)]
        backwards = [Action("B", rank, m) for m in range(microbatches)]
        rows.append(alternate(forwards, backwards, warmup))
    return ScheduleTable("1f1b", lay_straight(ranks), microbatches, tuple(rows))


def alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> tuple[Action, ...]:
    """Return ``warmup`` forwards, then one forward and one backward in turn, then the remaining backwards."""
    steady = [action for both in zip(forwards[warmup:], backwards, strict=False) for action in both]
    return tuple(forwards[:warmup] + steady + backwards[len(forwards) - warmup :])


ONE_F_ONE_B = Family(
    "1f1b",
    build_1f1b,
    STRAIGHT,
    splits=False,
    pairs=False,
    sizes="any",
    bubble="(P-1)(F+B)",
    activations="P",
    source="arXiv 2104.04473",
    picture="""
rank 0: F0 F1       B0 F2 B1    B2
rank 1:    F0 B0 F1 B1 F2 B2
""",
)
