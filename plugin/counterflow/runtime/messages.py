"""Which tensors a table moves between ranks, and in which order on each directed pair of ranks.

A stage's output goes forward to the next stage, its input gradient back to the one before. Both ends
derive the same order from the same table: the order in which the sender computes. So one FIFO per
direction is enough, as NCCL provides, and no message needs a header.
"""

from counterflow.schedule.dependencies import Result, find_receiver, find_result
from counterflow.schedule.table import ScheduleTable


def list_messages(table: ScheduleTable) -> dict[tuple[int, int], list[Result]]:
    """Return what each (sending rank, receiving rank) moves, in the order in which the sender computes."""
    moved: dict[tuple[int, int], list[Result]] = {}
    for sender in range(table.ranks):
        for single in table.singles(sender):
            result, receiver = find_result(single), find_receiver(table, single)
            if result is not None and receiver is not None and receiver != sender:
                moved.setdefault((sender, receiver), []).append(result)
    return moved
