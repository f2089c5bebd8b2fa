"""Interleaved 1F1B: v stages a rank, so that the pipeline fills in smaller steps; Megatron's schedule.

Source: Megatron-LM, arXiv 2104.04473, section 2.2.2. P ranks, v chunks a rank (looped), M micro-batches, F and B per chunk.
Rank r has ((v+1)P - 2r - 1) / v live activations.

With ``ep_overlap``, Megatron's ``--overlap-moe-expert-parallel-comm``: one more chunk of warm-up makes each forward independent
of the backward beside it, and the two run as an overlapped pair; 1/v micro-batches more live.
"""

from counterflow.bounds import take_whole
from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, pair
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.one_f_one_b import alternate
from counterflow.schedule.families.rows import require
from counterflow.schedule.layouts import LOOPED, lay_looped
from counterflow.schedule.table import ScheduleTable


def build_interleaved(
    ranks: int, microbatches: int, vpp: int = 2, group: int | None = None, ep_overlap: bool = False
) -> ScheduleTable:
    """Return Megatron's interleaved table: ``group`` micro-batches (P by default) pass chunk after chunk.

    M is a multiple of ``group``, or leaves a remainder of at least P, as Megatron demands.
    """
    group = ranks if group is None else take_whole(group, "interleaved: group", 1, error=ScheduleError)
    if vpp < 2:
        raise ScheduleError(f"interleaved: vpp {vpp} given; it needs at least 2 chunks per rank")
    remainder = microbatches % group
    require(
        ranks >= 2 and ranks <= group <= microbatches and not 0 < remainder < ranks,
        "interleaved",
        ranks,
        microbatches,
        f"at least 2 ranks and a number of micro-batches that is a multiple of {group}"
        + (f" or leaves a remainder of at least {ranks}" if group > ranks else ""),
    )
    layout = lay_looped(ranks, vpp)
    # (chunk, micro-batch) in the order of the forwards; backwards take the chunks in reverse.
    order = [
        (chunk, m)
        for start in range(0, microbatches, group)
        for chunk in range(vpp)
        for m in range(start, min(start + group, microbatches))
    ]
    rows = []
    for rank in range(ranks):
        warmup = min((ranks - 1 - rank) * 2 + (vpp - 1) * group + bool(ep_overlap), len(order))
        forwards = [Action("F", layout.stages[rank][chunk], m) for chunk, m in order]
        backwards = [Action("B", layout.stages[rank][vpp - 1 - chunk], m) for chunk, m in order]
        rows.append((_overlap if ep_overlap else alternate)(forwards, backwards, warmup))
    return ScheduleTable("interleaved", layout, microbatches, tuple(rows))


def _overlap(forwards: list[Action], backwards: list[Action], warmup: int) -> tuple[Action, ...]:
    """Return ``warmup`` forwards, then overlapped pairs, then the remaining backwards."""
    pairs = [pair(forward, backward) for forward, backward in zip(forwards[warmup:], backwards, strict=False)]
    return tuple(forwards[:warmup] + pairs + backwards[len(forwards) - warmup :])


INTERLEAVED = Family(
    "interleaved",
    build_interleaved,
    LOOPED,
    splits=False,
    pairs=True,
    sizes="M a multiple of P",
    bubble="(P-1)(F+B)",
    activations="P + (P-1)/v, with `ep_overlap` P + P/v",
    source="arXiv 2104.04473, Megatron-Core",
    picture="""
rank 0: 0F0 0F1 2F0 2F1     2B0 2B1 0B0 0B1
rank 1:     1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
""",
)
