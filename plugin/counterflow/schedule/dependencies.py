"""What an action makes for others, what it starts from, and who is waiting for it."""

from typing import NamedTuple

from counterflow.schedule.actions import Action
from counterflow.schedule.table import ScheduleTable


class Result(NamedTuple):
    """What an F (kind ``F``) or an I or B (kind ``B``) of a (stage, micro-batch) makes: its output, or its input gradient."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def find_result(single: Action) -> Result | None:
    """Return what a single action makes for others; a W and an R make nothing."""
    return None if single.kind in "WR" else Result("F" if single.kind == "F" else "B", single.stage, single.microbatch)


def find_input(single: Action, last_stage: int) -> Result | None:
    """Return the result of a neighbouring stage that a single action starts from, if any."""
    if single.kind == "F" and single.stage > 0:
        return Result("F", single.stage - 1, single.microbatch)
    if single.kind in "BI" and single.stage < last_stage:
        return Result("B", single.stage + 1, single.microbatch)
    return None


def find_receiver(table: ScheduleTable, single: Action) -> int | None:
    """Return the rank that a single action's result goes to, its own included; None where nobody needs it."""
    if single.kind == "F" and single.stage < table.layout.last_stage:
        return table.rank_of(single.stage + 1, single.microbatch)
    if single.kind in "BI" and single.stage > 0:
        return table.rank_of(single.stage - 1, single.microbatch)
    return None
