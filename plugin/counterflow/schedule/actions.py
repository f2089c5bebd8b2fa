"""What one pipeline rank does at one point of a schedule.

Text form: the compute-action notation of ``torch.distributed.pipelining``: stage, kind, micro-batch
(``3F0``, ``3I1``, ``3W1``, ``3B1``); an overlapped pair is ``(2F5;5B1)OVERLAP_F_B``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from counterflow.errors import ScheduleError

KINDS = ("F", "I", "W", "B")
PAIR = "F&B"

_SINGLE = re.compile(r"(\d{1,6})([FIWB])(\d{1,9})")
_PAIRED = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class Action:
    """One F, I, W or B of a (stage, micro-batch), or an overlapped pair of an F and a B.

    A pair has kind ``F&B``, its F and its B in ``parts``, and the stage and micro-batch of its F.
    """

    kind: str
    stage: int
    microbatch: int
    parts: tuple["Action", ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))})OVERLAP_F_B"
        return f"{self.stage}{self.kind}{self.microbatch}"

    def singles(self) -> Iterator["Action"]:
        """Yield the F, I, W and B actions inside this one, in order of execution."""
        yield from self.parts or (self,)


def pair(forward: Action, backward: Action) -> Action:
    """Return the overlapped pair of an F and a B."""
    if forward.kind != "F" or backward.kind != "B":
        raise ScheduleError(f"an overlapped pair is an F and a B, not {forward} and {backward}")
    return Action(PAIR, forward.stage, forward.microbatch, (forward, backward))


def parse_action(text: str) -> Action:
    """Read one action; raises `ScheduleError` that quotes what cannot be read."""
    text = text.strip()
    if match := _SINGLE.fullmatch(text):
        return Action(match[2], int(match[1]), int(match[3]))
    if match := _PAIRED.fullmatch(text):
        return pair(parse_action(match[1]), parse_action(match[2]))
    shown = text if len(text) <= 40 else text[:37] + "..."
    raise ScheduleError(f"{shown!r} is not an action; write one like 3F0, 3I1, 3W1, 3B1 or (2F5;5B1)OVERLAP_F_B")
