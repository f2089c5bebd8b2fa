"""Point-to-point transfers of one rank: sends that never wait, receives posted ahead of their use."""

import zlib
from collections import deque
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.groups import open_process_group
from counterflow.runtime.lanes import Lanes, QueuedTransfer, say_if_kernels_are_lazy
from counterflow.runtime.lowering import Program, Transfer
from counterflow.runtime.messages import (
    HEADER_SIZE,
    MAX_MEMBERS,
    Announced,
    Form,
    Member,
    Message,
    describe_form,
    describe_message,
    list_members,
    read_header,
    write_header,
)
from counterflow.schedule.dependencies import Result

# The tags of one message: the first is the header's, then one for each member.
TAGS = 1 + MAX_MEMBERS
HEADER = -1


class Channels:
    """One process group for each pair of ranks that send to each other, and each direction.

    NCCL runs the transfers of a group one after the other. With both directions in one group, two ranks that each send before
    they receive would wait for each other for ever; so could a rank that receives from one side what it sends on to the other.

    ``pipeline_ranks`` are the global ranks of the pipeline, in pipeline order; a transfer that takes longer
    than ``timeout`` fails.
    """

    def __init__(self, pipeline_ranks: list[int], rank: int, timeout: timedelta) -> None:
        self.pipeline_ranks = pipeline_ranks
        self.rank = rank
        self.timeout = timeout
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        self._lanes: Lanes | None = None

    def start_send(self, tensor: torch.Tensor, receiver: int, tag: int) -> dist.Work | QueuedTransfer:
        """Start sending to a pipeline rank; the group's own call, since ``dist.isend`` around it takes as long again."""
        group = self._groups[self.rank, receiver]
        place = 1 - group.rank()
        if self._lanes is None:
            return group.send([tensor], place, tag)
        return self._lanes.send(self.rank, receiver, partial(group.send, [tensor], place, tag))

    def start_receive(self, buffer: torch.Tensor, sender: int, tag: int) -> dist.Work | QueuedTransfer:
        """Start receiving from a pipeline rank."""
        group = self._groups[sender, self.rank]
        place = 1 - group.rank()
        if self._lanes is None:
            return group.recv([buffer], place, tag)
        return self._lanes.receive(sender, self.rank, partial(group.recv, [buffer], place, tag))

    def pick_group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """Return the group for messages from ``sender`` to ``receiver`` (pipeline ranks); the first time, both have to ask."""
        if (sender, receiver) not in self._groups:
            ranks = [self.pipeline_ranks[sender], self.pipeline_ranks[receiver]]
            self._groups[sender, receiver] = open_process_group(ranks, self.timeout, f"CF_{sender}_TO_{receiver}")
        return self._groups[sender, receiver]

    def connect(self, program: Program, form: Form | None, device: torch.device) -> None:
        """Before a table's first run: compare tables across all ranks, then connect each directed pair in one order.

        Without the common order, ranks that connect lazily in the order of their own work can wait
        for each other for ever. Raises `ScheduleError` on every rank where one has another table, or, in this pipeline, another
        form of messages.
        """
        table = program.table
        mine = torch.tensor([table.digest, zlib.crc32(repr(form).encode())], dtype=torch.int64, device=device)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        # All pipelines, not this one alone: their ranks meet in the experts' all-to-all.
        dist.all_gather(gathered, mine)
        digests = [each.tolist() for each in gathered]
        others = [rank for rank, (digest, _) in enumerate(digests) if digest != digests[0][0]]
        if others:
            raise ScheduleError(
                f"ranks {_shorten(others)} have another table than rank 0 (here {table.name}, digest {table.digest:x}): "
                "give every rank the same --cf-schedule and, of a file, the same contents"
            )
        first = self.pipeline_ranks[0]
        others = [rank for rank in self.pipeline_ranks if digests[rank][1] != digests[first][1]]
        if others:
            raise ScheduleError(
                f"ranks {_shorten(others)} send messages of another form than rank {first} (here {describe_form(form)}): "
                "give every rank of a pipeline the same count, shapes and types"
            )
        if device.type == "cuda" and self._lanes is None:
            self._lanes = Lanes(self.timeout)
            say_if_kernels_are_lazy()
        pairs = {(s, r) for s in range(table.ranks) for r in _list_receivers(program, s)}
        for sender, receiver in sorted(pairs):
            if self.rank == sender:
                dist.send(mine, self.pipeline_ranks[receiver], group=self.pick_group(sender, receiver))
            elif self.rank == receiver:
                dist.recv(mine, self.pipeline_ranks[sender], group=self.pick_group(sender, receiver))


def _shorten(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _list_receivers(program: Program, sender: int) -> set[int]:
    """Return the ranks that ``sender`` sends to: the homes of the stages beside its own."""
    layout = program.table.layout
    beside = {stage + way for stage in layout.stages[sender] for way in (-1, 1)}
    return {home for stage in beside for home in layout.homes.get(stage, ())} - {sender}


class Waiting(NamedTuple):
    """A member of a message that a rank waits for, or the message's header; ``is_alone`` if messages have one member."""

    transfer: Transfer
    member: int
    is_alone: bool

    def __str__(self) -> str:
        if self.member == HEADER:
            return f"the header of {self.transfer}"
        return str(self.transfer) if self.is_alone else f"member {self.member} of {self.transfer}"


# A member that is being received: its place in the message, its buffer, its transfer, and whether it needs a gradient.
_Coming = tuple[int, torch.Tensor, dist.Work | QueuedTransfer, bool]


class Mailbox:
    """The transfers of one rank during one run of its program.

    ``form`` describes every stage's output, and so the gradients of it; None if even the number of members varies. If a shape
    varies, each message is sent with a header before it, and nothing is received ahead, since the header has the sizes. With
    `Announced` that is so in its first run alone.

    The CPU platform's torch-function mode costs more than the calls that are made here, so it is off in them.
    """

    def __init__(self, channels: Channels, form: Form | Announced | None, device: torch.device) -> None:
        self._announced = form if isinstance(form, Announced) else None
        form = None if isinstance(form, Announced) else form
        if form is not None and len(form) > MAX_MEMBERS:
            raise ScheduleError(f"messages of {len(form)} tensors given; at most {MAX_MEMBERS}")
        self._channels, self._form, self._device = channels, form, device
        self._is_fixed = form is not None and all(member.shape is not None for member in form)
        if self._announced is not None:
            self._is_fixed = self._announced.is_complete
        outputs = list(enumerate(form or ()))
        # The members that are sent of a message whose form is known: every output, and the gradients that are wanted.
        self._travels = {"F": outputs, "B": [(index, member) for index, member in outputs if member.returns]}
        self._is_alone = form is not None and len(form) == 1
        self._waiting: tuple[Transfer, int] | None = None
        self._sent: dict[int, list[tuple[torch.Tensor, dist.Work | QueuedTransfer]]] = {}
        self._posted: dict[int, list[_Coming]] = {}
        # If shapes vary: the messages that each peer sends next, in its order, and those received before they were needed.
        self._expected: dict[int, deque[Transfer]] = {}
        self._taken: dict[int, Message] = {}
        # On a GPU, lanes have the limit.
        self._limit = (channels.timeout,) if device.type == "cpu" else ()

    def post(self, transfers: tuple[Transfer, ...]) -> None:
        """Post receives, so that their senders find them open."""
        for transfer in transfers:
            if self._is_fixed:
                self._posted[transfer.tag] = self._start_receives(transfer, self._list_sent(transfer.message))
            else:
                self._expected.setdefault(transfer.peer, deque()).append(transfer)

    def receive(self, transfer: Transfer, delivered: tuple[int, ...] = ()) -> Message:
        """Wait for a message that was posted and return it; release the sends that are ``delivered`` by then.

        A member of an output needs a gradient if the sender's did, and none if gradients are off.
        """
        if self._is_fixed:
            count = len(self._travels["F"]) if self._announced is None else self._announced.count(transfer.message)
            message = self._finish_receives(transfer, self._posted.pop(transfer.tag), count)
        else:
            while transfer.tag not in self._taken:
                coming = self._expected[transfer.peer].popleft()
                self._taken[coming.tag] = self._receive_announced(coming)
            message = self._taken.pop(transfer.tag)
        self._waiting = None
        for tag in delivered:
            self._let_go(tag)
        return message

    def send(self, transfer: Transfer, message: Message) -> None:
        """Start sending a message; returns at once. The caller may free or reuse the tensor objects."""
        with torch._C.DisableTorchFunction():
            travels = self._travels[transfer.message.kind]
            if self._form is not None and (
                len(message) != len(self._form) or not all(self._fits(message[index], wanted) for index, wanted in travels)
            ):
                self._refuse(transfer, message)
            if self._announced is not None:
                self._announced.require_like(transfer.message, list_members(message))
            if not self._is_fixed:
                self._start_send(torch.tensor(write_header(message), device=self._device), transfer, HEADER)
            for index, _ in travels if self._form is not None else enumerate(message):
                member = message[index]
                if member is not None:
                    # A tensor object of our own keeps the storage when the caller frees the output's data.
                    self._start_send(member.detach().contiguous(), transfer, index)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for tag in list(self._sent):
            self._let_go(tag)
        if self._announced is not None:
            self._announced.is_complete = True

    @property
    def waiting(self) -> Waiting | None:
        """The member or header that this rank waits for now, None if it does not wait; any thread may read it."""
        waiting = self._waiting
        return Waiting(*waiting, self._is_alone) if waiting is not None else None

    def _fits(self, member: torch.Tensor | None, wanted: Member) -> bool:
        if member is None:
            return not self._is_fixed
        shape, dtype, _ = wanted
        return (
            member.dtype == dtype
            and (shape is None or member.shape == shape)
            and (not member.requires_grad or wanted.returns)  # otherwise its gradient would be lost
        )

    def _refuse(self, transfer: Transfer, message: Message) -> None:
        """Raise `ScheduleError` that shows the message and the form that it should have."""
        of, what = transfer.message, "gradients " if transfer.message.kind == "B" else ""
        raise ScheduleError(
            f"stage {of.stage} gave {what}{describe_message(message)} for micro-batch {of.microbatch}; "
            f"the pipeline sends {describe_form(self._form)}: all stages must agree on it"
        )

    def _list_sent(self, message: Result) -> list[tuple[int, Member]]:
        """Return the members that are sent of a message whose form is known."""
        return self._travels[message.kind] if self._announced is None else self._announced.list_sent(message)

    def _receive_announced(self, transfer: Transfer) -> Message:
        """Receive a header, then the members that it announces."""
        ((_, header, work, _),) = self._start_receives(transfer, [(HEADER, Member((HEADER_SIZE,), torch.int64))])
        self._waiting = transfer, HEADER
        work.wait(*self._limit)
        announced = read_header(header.tolist())
        if self._announced is not None:
            self._announced.require_like(transfer.message, announced)
        if self._form is not None and (
            len(announced) != len(self._form)
            or any(one and one.dtype != wanted.dtype for one, wanted in zip(announced, self._form, strict=True))
        ):
            raise ScheduleError(
                f"{transfer} brings {', '.join(map(str, announced))}; here {describe_form(self._form)} is expected: "
                "all ranks must agree on it"
            )
        coming = [(index, member) for index, member in enumerate(announced) if member is not None]
        return self._finish_receives(transfer, self._start_receives(transfer, coming), len(announced))

    def _start_receives(self, transfer: Transfer, members: list[tuple[int, Member]]) -> list[_Coming]:
        started = []
        is_output = transfer.message.kind == "F"
        for index, member in members:
            shape, dtype, _ = member
            assert shape is not None
            with torch._C.DisableTorchFunction():
                buffer = torch.empty(shape, dtype=dtype, device=self._device)
            work = self._channels.start_receive(buffer, transfer.peer, transfer.tag * TAGS + 1 + index)
            started.append((index, buffer, work, is_output and member.returns))
        return started

    def _finish_receives(self, transfer: Transfer, coming: list[_Coming], count: int) -> Message:
        """Wait for the members ``coming``; return a message of ``count`` members, None for the others."""
        message: list[torch.Tensor | None] = [None] * count
        for index, buffer, work, needs_gradient in coming:
            self._waiting = transfer, index
            work.wait(*self._limit)
            message[index] = buffer
            if needs_gradient and torch.is_grad_enabled():
                with torch._C.DisableTorchFunction():
                    buffer.requires_grad_()
        return tuple(message)

    def _let_go(self, tag: int) -> None:
        # A send of gloo completes only in its wait, which returns at once if the data has left.
        for _, work in self._sent.pop(tag):
            work.wait(*self._limit)

    def _start_send(self, tensor: torch.Tensor, transfer: Transfer, index: int) -> None:
        work = self._channels.start_send(tensor, transfer.peer, transfer.tag * TAGS + 1 + index)
        self._sent.setdefault(transfer.tag, []).append((tensor, work))
