"""Which tensors a table moves between ranks, and in which order on each directed pair of ranks.

A stage's output goes forward to the next stage, its input gradient back to the one before. Both ends
derive the same order from the same table: the order in which the sender computes. So one FIFO per
direction is enough, as NCCL provides, and no message needs a header.
"""

from dataclasses import dataclass

from counterflow.schedule.actions import Action
from counterflow.schedule.table import ScheduleTable


@dataclass(frozen=True, slots=True)
class Message:
    """The output (F) or input gradient (B) of a (stage, micro-batch), on its way to ``to_stage``."""

    kind: str
    stage: int
    microbatch: int
    to_stage: int


def find_message(single: Action, last_stage: int) -> Message | None:
    """Return the message that an F, B or I leads to, if it has a stage to go to."""
    if single.kind == "F" and single.stage < last_stage:
        return Message("F", single.stage, single.microbatch, single.stage + 1)
    if single.kind in "BI" and single.stage > 0:
        return Message("B", single.stage, single.microbatch, single.stage - 1)
    return None


def find_input(single: Action, last_stage: int) -> Message | None:
    """Return the message that an F, B or I starts from, if it comes from another stage."""
    if single.kind == "F" and single.stage > 0:
        return Message("F", single.stage - 1, single.microbatch, single.stage)
    if single.kind in "BI" and single.stage < last_stage:
        return Message("B", single.stage + 1, single.microbatch, single.stage)
    return None


def list_messages(table: ScheduleTable) -> dict[tuple[int, int], list[Message]]:
    """Return what each (sending rank, receiving rank) moves, in the order in which the sender computes."""
    moved: dict[tuple[int, int], list[Message]] = {}
    for sender in range(table.ranks):
        for single in table.singles(sender):
            message = find_message(single, table.layout.last_stage)
            if message is None:
                continue
            receiver = table.layout.rank_of[message.to_stage]
            if receiver != sender:
                moved.setdefault((sender, receiver), []).append(message)
    return moved
