"""One clock for the records of several hosts: how far this host's clock is from that of the first rank's host."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

# All ranks read their clocks so often, each time as they leave a barrier.
READINGS = 16
# Changes with every start of a machine; containers on one machine have the same, and the same clock.
BOOT = Path("/proc/sys/kernel/random/boot_id")


def measure_offset(group: dist.ProcessGroup | None = None) -> float:
    """Return the seconds that turn this host's `time.monotonic` into that of the first rank's host (a collective call).

    Ranks on one host share a clock and get the same number. Between hosts it is right but for how much sooner ranks of one host
    leave a barrier than those of the other: the time of a message between them. It does not follow clocks that drift later.
    """
    readings = []
    for _ in range(READINGS):
        dist.barrier(group=group)
        readings.append(time.monotonic())
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (name_host(), readings), group=group)
    hosts, read = zip(*gathered, strict=True)
    return find_offset(hosts, read, dist.get_rank(group))


def name_host() -> str:
    """Return what ranks that share a clock have in common."""
    return BOOT.read_text().strip() if BOOT.exists() else socket.gethostname()


def find_offset(hosts: Sequence[str], readings: Sequence[Sequence[float]], rank: int) -> float:
    """Return the offset of a rank's host to the first rank's, from the readings of all ranks, ``[ranks][readings]``.

    In each round a host left the barrier with the median of its ranks; of the rounds' differences the median is taken.
    """
    if hosts[rank] == hosts[0]:
        return 0.0

    def leave(host: str) -> list[float]:
        own = [read for name, read in zip(hosts, readings, strict=True) if name == host]
        return [median(times) for times in zip(*own, strict=True)]

    return median(first - ours for first, ours in zip(leave(hosts[0]), leave(hosts[rank]), strict=True))
