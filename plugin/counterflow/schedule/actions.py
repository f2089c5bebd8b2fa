"""What one pipeline rank does at one point of a schedule.

Text form: the compute-action notation of ``torch.distributed.pipelining``: stage, kind, micro-batch
(``3F0``, ``3I1``, ``3W1``, ``3B1``); an overlapped pair is ``(2F5;5B1)OVERLAP_F_B``, a gradient reduction ``3REDUCE_GRAD``.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from counterflow.errors import ScheduleError

KINDS = ("F", "I", "W", "B", "R")
PAIR, REDUCTION = "F&B", "R"

_SINGLE = re.compile(r"(\d{1,6})([FIWB])(\d{1,9})")
_REDUCED = re.compile(r"(\d{1,6})REDUCE_GRAD")
_PAIRED = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class Action:
    """One F, I, W or B of a (stage, micro-batch), an overlapped pair of an F and a B, or an R of a stage.

    A pair has kind ``F&B``, its F and its B in ``parts``, and the stage and micro-batch of its F. An R starts the reduction of
    a chunk's gradients between data-parallel ranks, which runs beside what follows; it has no micro-batch and says 0.
    """

    kind: str
    stage: int
    microbatch: int = 0
    parts: tuple["Action", ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))})OVERLAP_F_B"
        return f"{self.stage}REDUCE_GRAD" if self.kind == REDUCTION else f"{self.stage}{self.kind}{self.microbatch}"

    def singles(self) -> Iterator["Action"]:
        """Yield the F, I, W, B and R actions inside this one, in order of execution."""
        yield from self.parts or (self,)


def pair(forward: Action, backward: Action) -> Action:
    """Return the overlapped pair of an F and a B."""
    if forward.kind != "F" or backward.kind != "B":
        raise ScheduleError(f"an overlapped pair is an F and a B, not {forward} and {backward}")
    return Action(PAIR, forward.stage, forward.microbatch, (forward, backward))


def make_whole(actions: Iterable[Action]) -> Iterator[Action]:
    """Yield the actions with whole backwards in place of split ones: each I as a B, and no W."""
    for action in actions:
        if action.kind != "W":
            yield replace(action, kind="B") if action.kind == "I" else action


def parse_action(text: str) -> Action:
    """Read one action; raises `ScheduleError` that quotes what cannot be read."""
    text = text.strip()
    if match := _SINGLE.fullmatch(text):
        return Action(match[2], int(match[1]), int(match[3]))
    if match := _REDUCED.fullmatch(text):
        return Action(REDUCTION, int(match[1]))
    if match := _PAIRED.fullmatch(text):
        return pair(parse_action(match[1]), parse_action(match[2]))
    shown = text if len(text) <= 40 else text[:37] + "..."
    raise ScheduleError(f"{shown!r} is not an action; write one like 3F0, 3I1, 3W1, 3B1, (2F5;5B1)OVERLAP_F_B or 3REDUCE_GRAD")
