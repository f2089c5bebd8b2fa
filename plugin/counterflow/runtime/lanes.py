"""Transfers as NCCL takes them without a deadlock: in each direction between two ranks one at a time.

NCCL runs a transfer as a kernel that waits on the GPU for its other end. Kernels of all streams lie in a few hardware queues
(``CUDA_DEVICE_MAX_CONNECTIONS``; Megatron's users often set 1). One that has to wait for an earlier one of its stream holds up
whatever lies behind it in its queue. So of two receives that are issued one after the other, the second can keep the computation
from starting whose result the sender of the first waits for.

Here, the next transfer of a lane is issued when the one before it has ended, and the host waits for what it receives. Then
nothing in a hardware queue waits for another rank but each lane's one kernel, which has started.
"""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from counterflow.devices import are_kernels_lazy

POLL_SECONDS = 2e-5


def say_if_kernels_are_lazy() -> None:
    """Print a line, on rank 0, if CUDA loads a kernel at its first use."""
    if are_kernels_lazy() and dist.get_rank() == 0:
        print(
            "counterflow: CUDA loads kernels at their first use: under a schedule the first step may wait for ever; set "
            "CUDA_MODULE_LOADING=EAGER in every rank's environment (docs/gpus.md)",
            flush=True,
        )


class QueuedTransfer:
    """A transfer that is issued when those before it in its lane have ended. It is waited for as torch's work is."""

    def __init__(self, lanes: "Lanes", issue: Callable[[], dist.Work]) -> None:
        self._lanes, self._issue = lanes, issue
        self._work: dist.Work | None = None

    @property
    def is_issued(self) -> bool:
        """Whether the GPU has it, or has had it."""
        return self._work is not None

    @property
    def has_ended(self) -> bool:
        """Whether its data have arrived."""
        return self._work is not None and self._work.is_completed()

    def issue(self) -> None:
        """Give it to the GPU, behind what this thread's stream has been given so far."""
        self._work = self._issue()

    def wait(self) -> None:
        """Wait on the host until it has ended, and let this thread's stream see its data."""
        self._lanes.wait_until(lambda: self.has_ended)
        assert self._work is not None
        self._work.wait()


class Lanes:
    """The lanes of one rank: one for each rank that it sends to, and one for each that it receives from.

    A wait that takes longer than ``timeout`` raises `TimeoutError`.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._seconds = timeout.total_seconds()
        self._lanes: dict[tuple[int, int], deque[QueuedTransfer]] = {}

    def receive(self, sender: int, receiver: int, issue: Callable[[], dist.Work]) -> QueuedTransfer:
        """Queue a receive; returns at once."""
        transfer = QueuedTransfer(self, issue)
        self._lanes.setdefault((sender, receiver), deque()).append(transfer)
        self.advance()
        return transfer

    def send(self, sender: int, receiver: int, issue: Callable[[], dist.Work]) -> QueuedTransfer:
        """Issue a send behind the computation that made it, before any later one, as soon as the lane is free."""
        transfer = self.receive(sender, receiver, issue)
        self.wait_until(lambda: transfer.is_issued)
        return transfer

    def advance(self) -> None:
        """Issue the next transfer of every lane whose last one has ended."""
        for lane in self._lanes.values():
            while lane:
                if not lane[0].is_issued:
                    lane[0].issue()
                if not lane[0].has_ended:
                    break
                lane.popleft()

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait on the host, and let every lane go on meanwhile: another rank may wait for what it brings."""
        end = time.monotonic() + self._seconds
        while True:
            self.advance()
            if is_reached():
                return
            if time.monotonic() > end:
                raise TimeoutError(f"timed out after {self._seconds:g} s, in which no other rank took or sent what is next")
            time.sleep(POLL_SECONDS)
