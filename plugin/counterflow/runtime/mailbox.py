"""Point-to-point transfers of one rank: sends that never wait, receives posted ahead of their use."""

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.runtime.messages import list_messages
from counterflow.schedule.dependencies import Result
from counterflow.schedule.table import ScheduleTable

# Receives kept posted on each incoming channel beyond what is needed now.
POSTED_AHEAD = 2


class Channels:
    """Two process groups over the pipeline's ranks: one for traffic to higher ranks, one to lower.

    NCCL runs the transfers of a pair of ranks one after the other. With both directions in one group,
    two ranks that each send before they receive would wait for each other for ever.

    ``pipeline_ranks`` are the global ranks of the pipeline, in pipeline order; a transfer that takes longer
    than ``timeout`` fails.
    """

    def __init__(self, pipeline_ranks: list[int], rank: int, timeout: timedelta) -> None:
        self.pipeline_ranks = pipeline_ranks
        self.rank = rank
        # Collective over these ranks alone: the other pipelines make their own.
        higher = dist.new_group(pipeline_ranks, timeout, use_local_synchronization=True, group_desc="CF_HIGHER")
        lower = dist.new_group(pipeline_ranks, timeout, use_local_synchronization=True, group_desc="CF_LOWER")
        assert isinstance(higher, dist.ProcessGroup) and isinstance(lower, dist.ProcessGroup)  # this rank is in them
        self._to_higher, self._to_lower = higher, lower

    def pick_group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """Return the group for messages from ``sender`` to ``receiver`` (pipeline ranks)."""
        return self._to_higher if sender < receiver else self._to_lower

    def connect(self, plan: "TransferPlan", device: torch.device) -> None:
        """Before a table's first run: connect each directed pair in one order, and compare digests.

        Without the common order, ranks that connect lazily in the order of their own work can wait
        for each other for ever. Raises `ScheduleError` where a neighbour runs another table.
        """
        strangers = []
        for sender, receiver in sorted(plan.messages):
            digest = torch.tensor([plan.table.digest], dtype=torch.int64, device=device)
            group = self.pick_group(sender, receiver)
            if self.rank == sender:
                dist.send(digest, self.pipeline_ranks[receiver], group=group)
            elif self.rank == receiver:
                dist.recv(digest, self.pipeline_ranks[sender], group=group)
                strangers += [sender] if int(digest) != plan.table.digest else []
        # Only now, so that no neighbour is left waiting for a rank that has given up.
        if strangers:
            raise ScheduleError(
                f"pipeline rank {self.rank} and its neighbour {strangers[0]} have different tables ({plan.table.name}): "
                "give every rank the same --cf-schedule and the same file"
            )


class TransferPlan:
    """A table with its messages listed: made once, used by every run of the table."""

    def __init__(self, table: ScheduleTable) -> None:
        self.table = table
        self.messages = list_messages(table)


@dataclass
class _Inbox:
    """One incoming channel: the messages still to post, in the sender's order, and those posted."""

    sender: int
    waiting: deque[Result]
    posted: dict[Result, tuple[torch.Tensor, dist.Work]] = field(default_factory=dict)


class Mailbox:
    """The transfers of one rank during one run of a table; every tensor has one shape and type."""

    def __init__(
        self, channels: Channels, plan: TransferPlan, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._channels = channels
        self._table = plan.table
        self._shape, self._dtype, self._device = shape, dtype, device
        self._sent: deque[tuple[torch.Tensor, dist.Work]] = deque()
        self._inbox_of: dict[Result, _Inbox] = {}
        for (sender, receiver), messages in plan.messages.items():
            if receiver == channels.rank:
                inbox = _Inbox(sender, deque(messages))
                self._inbox_of.update(dict.fromkeys(messages, inbox))
                self._post(inbox, POSTED_AHEAD)

    def _post(self, inbox: _Inbox, count: int) -> None:
        for _ in range(min(count, len(inbox.waiting))):
            message = inbox.waiting.popleft()
            buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            group = self._channels.pick_group(inbox.sender, self._channels.rank)
            source = self._channels.pipeline_ranks[inbox.sender]
            work = dist.irecv(buffer, source, group=group, tag=self._tag(message))
            assert work is not None  # this rank is in the group
            inbox.posted[message] = (buffer, work)

    def _tag(self, message: Result) -> int:
        # Gloo matches by tag; NCCL ignores it and keeps the order, which is the same on both ends.
        stages = self._table.layout.last_stage + 1
        return (message.microbatch * stages + message.stage) * 2 + (message.kind == "B")

    def send(self, message: Result, receiver: int, tensor: torch.Tensor) -> None:
        """Start sending ``tensor`` to a rank; returns at once. The caller may free or reuse the tensor object."""
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ScheduleError(
                f"stage {message.stage} gave {tuple(tensor.shape)} {tensor.dtype} for micro-batch {message.microbatch}; "
                f"the pipeline sends {self._shape} {self._dtype}"
            )
        self._forget_finished()
        group = self._channels.pick_group(self._channels.rank, receiver)
        # A tensor object of our own keeps the storage when the caller frees the output's data.
        own = tensor.detach().contiguous()
        work = dist.isend(own, self._channels.pipeline_ranks[receiver], group=group, tag=self._tag(message))
        assert work is not None  # this rank is in the group
        self._sent.append((own, work))

    def receive(self, message: Result) -> torch.Tensor:
        """Wait for a message and return its tensor; posts the next receives of that channel."""
        inbox = self._inbox_of[message]
        while message not in inbox.posted:
            self._post(inbox, 1)
        tensor, work = inbox.posted.pop(message)
        self._post(inbox, POSTED_AHEAD - len(inbox.posted))
        work.wait()
        return tensor

    def _forget_finished(self) -> None:
        while self._sent and self._sent[0][1].is_completed():
            self._sent.popleft()

    def finish(self) -> None:
        """Wait until everything sent has left."""
        while self._sent:
            self._sent.popleft()[1].wait()
