"""What pages, pictures and traces show of a device: a lane of how its window was spent, and its kernels by class and stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from counterflow.analysis.classes import COMMUNICATION, IS_COMMUNICATION, KINDS, WAITING
from counterflow.analysis.cluster import LEAST_EPOCH
from counterflow.analysis.intervals import intersect, subtract, unite
from counterflow.analysis.overlap import Device
from counterflow.analysis.trace import KERNEL, NONE
from counterflow.arrays import Array
from counterflow.errors import TraceError

MAX_KERNELS, MOST_DEVICES = 2_000_000, 64
# Streams of a class that have a lane each; those with the least time share the last.
MOST_STREAMS = 4
# What a lane shows beside the kinds of kernels: copies, and how the window was spent.
COPIES, ALONE, HIDDEN, EXPOSED = range(len(KINDS), len(KINDS) + 4)
NAMES = (*KINDS, "copies and fills", "computation alone", "hidden communication", "exposed communication")
STATES = "window"
PRODUCTS = ("gemm", "grouped_gemm", "conv")
SPECIAL = {
    "attention": "attention",
    NAMES[COPIES]: "copying",
    NAMES[ALONE]: "alone",
    NAMES[HIDDEN]: "communication",
    NAMES[EXPOSED]: "waiting",
}
# Words of the colours.
LEGEND = {
    "alone": "computation alone",
    "communication": "communication hidden behind it",
    "waiting": "exposed communication",
}
KERNEL_LEGEND = {
    "products": "matrix products",
    "attention": "attention",
    "computing": "other computation",
    "exchange": "expert dispatch, combine",
    "notify": "waiting for peers (notify)",
    "collective": "other communication",
    "copying": "copies and fills",
}


@dataclass(frozen=True)
class Lane:
    """What one lane shows, in order of starts: ``kinds`` are places in `NAMES`, ``rows`` places in the device's rows.

    ``start`` and ``end`` are nanoseconds from the window's begin. The lane of how the window was spent has no rows.
    """

    title: str
    detail: str
    kinds: Array
    rows: Array
    start: Array
    end: Array


def choose_shade(kind: str) -> str:
    """Return the name of a kind's colour."""
    if kind in COMMUNICATION:
        return "notify" if kind in WAITING else "exchange" if kind.startswith("ep_") else "collective"
    return "products" if kind in PRODUCTS else SPECIAL.get(kind, "computing")


def check_size(devices: Sequence[Device], form: str) -> None:
    """Raise `TraceError` for more kernels than a ``form`` (in words) can show."""
    count = sum(len(device.rows) for device in devices)
    if count > MAX_KERNELS:
        raise TraceError(
            f"{count:,} kernels given; {form} shows at most {MAX_KERNELS:,}: record fewer steps, or give fewer ranks"
        )


def list_lanes(device: Device) -> list[Lane]:
    """Return the lane of how the window was spent, then computation, communication and copies by stream, busiest first."""
    communicates, is_kernel = IS_COMMUNICATION[device.kind_of], device.trace.work.what[device.rows] == KERNEL
    classes = {
        "computation": is_kernel & ~communicates,
        "communication": communicates,
        "copies and fills": ~is_kernel,
    }
    lanes = [_spend_window(device)]
    for title, chosen in classes.items():
        lanes += _split_streams(device, title, np.flatnonzero(chosen))
    return lanes


def _spend_window(device: Device) -> Lane:
    states = {
        ALONE: subtract(device.compute, device.communication),
        HIDDEN: intersect(device.compute, device.communication),
        EXPOSED: subtract(device.communication, device.compute),
    }
    kinds = np.repeat(list(states), [len(union.starts) for union in states.values()])
    start, end = (np.concatenate([getattr(union, side) for union in states.values()]) for side in ("starts", "ends"))
    order = np.argsort(start, kind="stable")
    none = np.full(len(order), NONE)
    return Lane(STATES, "", kinds[order], none, start[order] - device.first, end[order] - device.first)


def _split_streams(device: Device, title: str, rows: Array) -> Iterator[Lane]:
    work = device.trace.work
    streams = work.stream[device.rows]
    times = {stream: _measure(device, rows[streams[rows] == stream]) for stream in np.unique(streams[rows]).tolist()}
    order = sorted(times, key=lambda stream: (-times[stream], stream))
    alone = order if len(order) <= MOST_STREAMS else order[: MOST_STREAMS - 1]
    for stream in alone:
        label = device.trace.streams[stream] if stream != NONE else None
        yield _make_lane(device, title, "" if label is None else f"stream {label}", rows[streams[rows] == stream])
    if rest := order[len(alone) :]:
        yield _make_lane(device, title, f"{len(rest)} more streams", rows[np.isin(streams[rows], rest)])


def _measure(device: Device, rows: Array) -> int:
    work, own = device.trace.work, device.rows[rows]
    return unite(work.start[own], work.end[own]).length


def _make_lane(device: Device, title: str, detail: str, rows: Array) -> Lane:
    work, own = device.trace.work, device.rows[rows]
    order = np.lexsort((-work.end[own], work.start[own]))
    rows, own = rows[order], own[order]
    kinds = device.kind_of[rows].astype(np.int64)
    kinds[kinds == NONE] = COPIES
    return Lane(title, detail, kinds, rows, work.start[own] - device.first, work.end[own] - device.first)


def find_offsets(devices: Sequence[Device]) -> tuple[list[int], bool]:
    """Return when each device's window begins on a time axis that all share, in nanoseconds, and whether their clocks are one.

    Devices of one file have one clock, and so have files whose clocks count from 1970. Others all begin at zero.
    """
    begins = [device.first + device.trace.base for device in devices]
    if len({device.trace.path for device in devices}) == 1 or min(begins) >= LEAST_EPOCH:
        return [begin - min(begins) for begin in begins], True
    return [0] * len(devices), False
