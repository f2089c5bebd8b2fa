"""Point-to-point transfers of one rank: sends that never wait, receives posted ahead of their use."""

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.runtime.lowering import Program, Transfer

# Room for a tensor's shape in the header that goes before it where shapes vary.
MAX_DIMENSIONS = 4


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
        self.timeout = timeout
        # Collective over these ranks alone: the other pipelines make their own.
        higher = dist.new_group(pipeline_ranks, timeout, use_local_synchronization=True, group_desc="CF_HIGHER")
        lower = dist.new_group(pipeline_ranks, timeout, use_local_synchronization=True, group_desc="CF_LOWER")
        assert isinstance(higher, dist.ProcessGroup) and isinstance(lower, dist.ProcessGroup)  # this rank is in them
        self._to_higher, self._to_lower = higher, lower
        # A group counts its ranks in the order of their global ranks, which need not be the pipeline's.
        self._place_of = [dist.get_group_rank(higher, global_rank) for global_rank in pipeline_ranks]

    def start_send(self, tensor: torch.Tensor, receiver: int, tag: int) -> dist.Work:
        """Start sending to a pipeline rank; the group's own call, since ``dist.isend`` around it takes as long again."""
        return self.pick_group(self.rank, receiver).send([tensor], self._place_of[receiver], tag)

    def start_receive(self, buffer: torch.Tensor, sender: int, tag: int) -> dist.Work:
        """Start receiving from a pipeline rank."""
        return self.pick_group(sender, self.rank).recv([buffer], self._place_of[sender], tag)

    def pick_group(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """Return the group for messages from ``sender`` to ``receiver`` (pipeline ranks)."""
        return self._to_higher if sender < receiver else self._to_lower

    def connect(self, program: Program, device: torch.device) -> None:
        """Before a table's first run: compare tables across all ranks, then connect each directed pair in one order.

        Without the common order, ranks that connect lazily in the order of their own work can wait
        for each other for ever. Raises `ScheduleError` on every rank where one has another table.
        """
        table = program.table
        mine = torch.tensor([table.digest], dtype=torch.int64, device=device)
        digests = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        # All pipelines, not this one alone: their ranks meet in the experts' all-to-all.
        dist.all_gather(digests, mine)
        others = [rank for rank, digest in enumerate(digests) if int(digest) != int(digests[0])]
        if others:
            raise ScheduleError(
                f"ranks {_shorten(others)} have another table than rank 0 (here {table.name}, digest {table.digest:x}): "
                "give every rank the same --cf-schedule and, of a file, the same contents"
            )
        pairs = {(s, r) for s in range(table.ranks) for r in _list_receivers(program, s)}
        for sender, receiver in sorted(pairs):
            group = self.pick_group(sender, receiver)
            if self.rank == sender:
                dist.send(mine, self.pipeline_ranks[receiver], group=group)
            elif self.rank == receiver:
                dist.recv(mine, self.pipeline_ranks[sender], group=group)


def _shorten(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _list_receivers(program: Program, sender: int) -> set[int]:
    """Return the ranks that ``sender`` sends to: the homes of the stages beside its own."""
    layout = program.table.layout
    beside = {stage + way for stage in layout.stages[sender] for way in (-1, 1)}
    return {home for stage in beside for home in layout.homes.get(stage, ())} - {sender}


class Mailbox:
    """The transfers of one rank during one run of its program.

    Every tensor has one ``shape`` and type. With ``shape`` None shapes vary, and a header goes before each tensor: then
    nothing is received ahead, since a tensor's size is known only once its header is there.

    A mode that looks at every call of torch, as the CPU platform's does, costs more than the calls: it is off in here.
    """

    def __init__(self, channels: Channels, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device) -> None:
        self._channels = channels
        self._shape, self._dtype, self._device = shape, dtype, device
        self._sent: dict[int, list[tuple[torch.Tensor, dist.Work]]] = {}
        self._posted: dict[int, tuple[torch.Tensor, dist.Work]] = {}
        # Where shapes vary: what each peer sends next, in its order, and what has been taken before it was needed.
        self._expected: dict[int, deque[Transfer]] = {}
        self._taken: dict[int, torch.Tensor] = {}
        # Waiting on a GPU orders streams and returns; a time limit there would stop the host instead.
        self._limit = (channels.timeout,) if device.type == "cpu" else ()

    def post(self, transfers: tuple[Transfer, ...]) -> None:
        """Post receives, so that their senders find them open."""
        for transfer in transfers:
            if self._shape is None:
                self._expected.setdefault(transfer.peer, deque()).append(transfer)
                continue
            self._posted[transfer.tag] = self._start_receive(transfer, self._shape, self._dtype, transfer.tag)

    def receive(self, transfer: Transfer, delivered: tuple[int, ...] = ()) -> torch.Tensor:
        """Wait for a message that has been posted and return its tensor; let go of sends that it shows to be ``delivered``."""
        tensor = self._receive(transfer)
        for tag in delivered:
            self._let_go(tag)
        return tensor

    def _receive(self, transfer: Transfer) -> torch.Tensor:
        if self._shape is None:
            while transfer.tag not in self._taken:
                coming = self._expected[transfer.peer].popleft()
                self._taken[coming.tag] = self._receive_any_shape(coming)
            return self._taken.pop(transfer.tag)
        tensor, work = self._posted.pop(transfer.tag)
        work.wait(*self._limit)
        return tensor

    def send(self, transfer: Transfer, tensor: torch.Tensor) -> None:
        """Start sending ``tensor``; returns at once. The caller may free or reuse the tensor object."""
        with torch._C.DisableTorchFunction():
            if tensor.dtype != self._dtype or (self._shape is not None and tensor.shape != self._shape):
                message = transfer.message
                raise ScheduleError(
                    f"stage {message.stage} gave {tuple(tensor.shape)} {tensor.dtype} for micro-batch {message.microbatch}; "
                    f"the pipeline sends {self._shape or 'any shape'} {self._dtype}: all stages must agree on it"
                )
            # A tensor object of our own keeps the storage when the caller frees the output's data.
            own = tensor.detach().contiguous()
            if self._shape is not None:
                self._start_send(own, transfer, transfer.tag)
                return
            header = [tensor.dim(), *tensor.shape, *[0] * (MAX_DIMENSIONS - tensor.dim())]
            self._start_send(torch.tensor(header, device=self._device), transfer, 2 * transfer.tag)
            self._start_send(own, transfer, 2 * transfer.tag + 1)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for tag in list(self._sent):
            self._let_go(tag)

    def _let_go(self, tag: int) -> None:
        # Gloo's sends do not say by themselves that they are done; of one that is, the wait returns at once.
        for _, work in self._sent.pop(tag):
            work.wait(*self._limit)

    def _receive_any_shape(self, transfer: Transfer) -> torch.Tensor:
        header, work = self._start_receive(transfer, (1 + MAX_DIMENSIONS,), torch.int64, transfer.tag * 2)
        work.wait(*self._limit)
        dimensions, *shape = header.tolist()
        tensor, work = self._start_receive(transfer, tuple(shape[:dimensions]), self._dtype, transfer.tag * 2 + 1)
        work.wait(*self._limit)
        return tensor

    def _start_receive(
        self, transfer: Transfer, shape: tuple[int, ...], dtype: torch.dtype, tag: int
    ) -> tuple[torch.Tensor, dist.Work]:
        with torch._C.DisableTorchFunction():
            buffer = torch.empty(shape, dtype=dtype, device=self._device)
        return buffer, self._channels.start_receive(buffer, transfer.peer, tag)

    def _start_send(self, tensor: torch.Tensor, transfer: Transfer, tag: int) -> None:
        work = self._channels.start_send(tensor, transfer.peer, tag)
        self._sent.setdefault(transfer.tag, []).append((tensor, work))
