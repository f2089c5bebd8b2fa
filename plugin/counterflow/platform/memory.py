"""The memory functions of ``torch.cuda`` for a CPU process: its resident memory counts as allocated and as reserved.

The CPU's allocator does not count allocations, so counts are 0. A peak is that since the process began, since a process
cannot reset its own peak.
"""

import resource
import sys
from typing import Any

import psutil

_COUNTS = ("allocation", "segment", "active", "inactive_split")
_BYTES = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "requested_bytes")
_ALONE = (
    *("num_alloc_retries", "num_ooms", "num_oom_rejections", "num_sync_all_streams"),
    *("num_device_alloc", "num_device_free", "max_split_size"),
)
_VALUES = ("current", "peak", "allocated", "freed")
# The kinds that are reported as the resident memory; all others are 0.
_RESIDENT = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")


def get_resident(device: Any = None) -> int:
    """Return the bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def get_peak(device: Any = None) -> int:
    """Return the most bytes that this process has held."""
    # Linux counts in kilobytes, macOS in bytes; the kernel's count may be a page behind what it says of now.
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, get_resident())


def measure_machine(device: Any = None) -> tuple[int, int]:
    """Return the machine's free and whole memory in bytes."""
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def get_used(device: Any = None) -> int:
    """Return the bytes of the machine's memory that are in use, by all processes."""
    free, total = measure_machine()
    return total - free


def list_stats(device: Any = None) -> dict[str, int]:
    """Return every key of ``torch.cuda.memory_stats``."""
    stats = dict.fromkeys(_ALONE, 0)
    for kind in (*_COUNTS, *_BYTES):
        stats |= {f"{kind}.{pool}.{value}": 0 for pool in ("all", "large_pool", "small_pool") for value in _VALUES}
    for kind in ("oversize_allocations", "oversize_segments"):
        stats |= {f"{kind}.{value}": 0 for value in _VALUES}
    now, peak = get_resident(), get_peak()
    for kind in _RESIDENT:
        stats |= {f"{kind}.all.current": now, f"{kind}.all.peak": peak}
    return stats
