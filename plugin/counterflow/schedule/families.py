"""The schedules that can be built by name: 1F1B, interleaved 1F1B, DualPipeV, and a forward-only one.

P ranks, M micro-batches, F and B times per model chunk. Bubbles and live activations count per rank.

===========  ==============  ==============================  =============================================
name         stages on rank  bubble                          source
===========  ==============  ==============================  =============================================
1f1b         1 (straight)    (P-1)(F+B)                      PipeDream-Flush, Narayanan et al. 2021
interleaved  v (looped)      (P-1)(F+B)                      Megatron-LM, arXiv 2104.04473, section 2.2
dualpipev    2 (V)           (P-1)(F&B + B - 3W)             DeepSeek-V3, arXiv 2412.19437; DualPipe README
===========  ==============  ==============================  =============================================

The DualPipe README counts PP = 2P stages and writes the DualPipeV bubble as (PP/2-1)(F&B + B - 3W).
"""

from collections import deque
from collections.abc import Callable

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, pair
from counterflow.schedule.layouts import Layout, lay_looped, lay_straight, lay_v
from counterflow.schedule.table import ScheduleTable


def build_1f1b(ranks: int, microbatches: int) -> ScheduleTable:
    """One forward, one backward: rank r runs P-1-r forwards ahead, then alternates.

    ::

        rank 0: F0 F1       B0 F2 B1 ...
        rank 1:    F0 B0 F1 B1 F2 ...
    """
    _require(ranks >= 1 and microbatches >= 1, "1f1b", ranks, microbatches, "at least 1 of each")
    rows = []
    for rank in range(ranks):
        warmup = min(ranks - 1 - rank, microbatches)
        forwards = [Action("F", rank, m) for m in range(microbatches)]
        backwards = [Action("B", rank, m) for m in range(microbatches)]
        rows.append(_alternate(forwards, backwards, warmup))
    return ScheduleTable("1f1b", lay_straight(ranks), microbatches, tuple(rows))


def build_interleaved(ranks: int, microbatches: int, vpp: int = 2, group: int | None = None) -> ScheduleTable:
    """Megatron's interleaved 1F1B: ``group`` micro-batches (P by default) pass chunk after chunk.

    M is a multiple of ``group``, or leaves a remainder of at least P, as Megatron demands.
    """
    group = ranks if group is None else group
    _require(vpp >= 2, "interleaved", ranks, microbatches, f"at least 2 chunks per rank, not {vpp}")
    remainder = microbatches % group
    _require(
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
        warmup = min((ranks - 1 - rank) * 2 + (vpp - 1) * group, len(order))
        forwards = [Action("F", layout.stages[rank][chunk], m) for chunk, m in order]
        backwards = [Action("B", layout.stages[rank][vpp - 1 - chunk], m) for chunk, m in order]
        rows.append(_alternate(forwards, backwards, warmup))
    return ScheduleTable("interleaved", layout, microbatches, tuple(rows))


def build_dualpipev(ranks: int, microbatches: int) -> ScheduleTable:
    """DualPipeV: every rank holds a stage of the way there and one of the way back, and runs the
    forward of one beside the backward of the other.

    Needs M >= 2P. In the steps below ``there`` and ``back`` are the rank's two stages.

    ::

        rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1) (3F2;0B0) ...
        rank 1: 1F0 2F0 1F1 2F1 (1F2 2B0) (2F2;1B0) ...
    """
    _require(
        ranks >= 1 and microbatches >= 2 * ranks,
        "dualpipev",
        ranks,
        microbatches,
        f"at least {2 * ranks} micro-batches (two per rank)",
    )
    layout = lay_v(ranks)
    rows = tuple(_fill_dualpipev_row(rank, ranks, microbatches, layout.stages[rank]) for rank in range(ranks))
    return ScheduleTable("dualpipev", layout, microbatches, rows)


class _Row:
    """A DualPipeV row under construction: counts each stage's micro-batches, queues split W's."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: dict[tuple[str, int], int] = {}
        self._weights: deque[Action] = deque()

    def take(self, kind: str, stage: int) -> Action:
        """Return the F or B of the stage's next micro-batch."""
        microbatch = self._next.get((kind, stage), 0)
        self._next[kind, stage] = microbatch + 1
        return Action(kind, stage, microbatch)

    def forward(self, stage: int) -> None:
        self.actions.append(self.take("F", stage))

    def backward(self, stage: int, split: bool = False) -> None:
        whole = self.take("B", stage)
        if split:
            self._weights.append(Action("W", stage, whole.microbatch))
            whole = Action("I", stage, whole.microbatch)
        self.actions.append(whole)

    def weight(self) -> None:
        self.actions.append(self._weights.popleft())

    def overlap(self, forward_stage: int, backward_stage: int) -> None:
        self.actions.append(pair(self.take("F", forward_stage), self.take("B", backward_stage)))


def _fill_dualpipev_row(rank: int, ranks: int, microbatches: int, stages: tuple[int, ...]) -> tuple[Action, ...]:
    """The eight steps of DeepSeek's published schedule (deepseek-ai/DualPipe, DualPipeV)."""
    there, back = stages
    row = _Row()
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


def build_forward_only(layout: Layout, microbatches: int) -> ScheduleTable:
    """Forwards of any layout, for evaluation: ordered by the tick stage + micro-batch, deep stages first."""
    rows = []
    for stages in layout.stages:
        forwards = [Action("F", stage, m) for stage in stages for m in range(microbatches)]
        rows.append(tuple(sorted(forwards, key=lambda a: (a.stage + a.microbatch, -a.stage))))
    return ScheduleTable("forward-only", layout, microbatches, tuple(rows))


FAMILIES: dict[str, Callable[..., ScheduleTable]] = {
    "1f1b": build_1f1b,
    "interleaved": build_interleaved,
    "dualpipev": build_dualpipev,
}


def build(name: str, ranks: int, microbatches: int, **options: int) -> ScheduleTable:
    """Build a schedule by name (`FAMILIES`); ``interleaved`` takes ``vpp`` and ``group``.

    Raises `ScheduleError` for an unknown name or a size that the schedule does not allow.
    """
    if name not in FAMILIES:
        raise ScheduleError(f"schedule {name!r} is not known; allowed: {', '.join(FAMILIES)}")
    return FAMILIES[name](ranks, microbatches, **options)


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> tuple[Action, ...]:
    """``warmup`` forwards, then one forward and one backward in turn, then the remaining backwards."""
    steady = [action for both in zip(forwards[warmup:], backwards, strict=False) for action in both]
    return tuple(forwards[:warmup] + steady + backwards[len(forwards) - warmup :])


def _require(fits: bool, name: str, ranks: int, microbatches: int, allowed: str) -> None:
    if not fits:
        raise ScheduleError(f"{name}: {microbatches} micro-batches on {ranks} ranks given; it needs {allowed}")
