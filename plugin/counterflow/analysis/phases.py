"""Which annotation a kernel belongs to: the innermost around its launch, else around its run on the GPU."""

import re
from collections.abc import Iterable

import numpy as np

from counterflow.analysis.trace import NONE, Ranges, Trace
from counterflow.arrays import Array

# Steps of the profiler, what communication libraries note beside their kernels, and operators under emit_nvtx.
NO_PHASE = re.compile(
    r"(ProfilerStep#|nccl:|gloo:|mccl:|record_param_comms|PyTorch Profiler|counterflow (step|layer) )|.*, (op_id|seq) = \d+"
)
WITHOUT = "(none)"


def has_annotations(trace: Trace) -> bool:
    """Tell whether the trace has annotations at all, phases or not."""
    return bool(len(trace.ranges.name) or len(trace.gpu_ranges.name))


def find_phases(trace: Trace) -> tuple[Array, Array]:
    """Return, for each row of GPU work, the number of its phase's name (-1: none) and the row of its launch (-1: unknown).

    A phase is the innermost annotation, the one that starts last and then ends first, around the launch: on its thread, else on
    any thread of the process, since autograd launches from a thread of its own. Without a launch it is the innermost GPU
    annotation of the device and stream at the kernel's start.
    """
    launch = find_launches(trace)
    phases = np.full(len(launch), NONE, np.int64)
    named = np.array([NO_PHASE.match(name) is None for name in trace.names], bool)
    ranges, launched = keep_named(trace.ranges, named), np.flatnonzero(launch != NONE)
    if len(ranges.name) and len(launched):
        calls, rows = trace.launches, launch[launched]
        process, thread, times = calls.process[rows], calls.thread[rows], calls.start[rows]
        phases[launched] = find_innermost(ranges, join(process, thread), join(ranges.scope, ranges.lane), times)
        left = phases[launched] == NONE
        phases[launched[left]] = find_innermost(ranges, process[left], ranges.scope, times[left])
    ranges, loose = keep_named(trace.gpu_ranges, named), np.flatnonzero(launch == NONE)
    if len(ranges.name) and len(loose):
        work = trace.work
        lanes = join(work.device[loose], work.stream[loose])
        phases[loose] = find_innermost(ranges, lanes, join(ranges.scope, ranges.lane), work.start[loose])
    return phases, launch


def find_launches(trace: Trace) -> Array:
    """Return the row of each kernel's launch, by process and correlation, else by correlation alone; -1 for none.

    Where several calls have one correlation, a call of the runtime and one of the driver in it, the last to start counts.
    """
    work, calls = trace.work, trace.launches
    found = _look_up(join(calls.process, calls.correlation), calls.start, join(work.process, work.correlation))
    found[work.process == NONE] = NONE
    left = (found == NONE) & (work.correlation != NONE)
    found[left] = _look_up(calls.correlation, calls.start, work.correlation[left])
    found[work.correlation == NONE] = NONE
    return found


def join(first: Array, second: Array) -> Array:
    """Return one number for each pair, as of a process and a thread."""
    return (first.astype(np.int64) << 40) ^ second.astype(np.int64)


def _look_up(keys: Array, times: Array, wanted: Array) -> Array:
    if not len(keys):
        return np.full(len(wanted), NONE, np.int64)
    order = np.lexsort((times, keys))
    place = np.searchsorted(keys[order], wanted, side="right") - 1
    found = order[np.maximum(place, 0)]
    return np.where((place >= 0) & (keys[found] == wanted), found, NONE)


def keep_named(ranges: Ranges, named: Array) -> Ranges:
    """Return the ranges with the names that count, by number."""
    kept = named[ranges.name]
    return Ranges(*(column[kept] for column in (ranges.scope, ranges.lane, ranges.name, ranges.start, ranges.end)))


def find_innermost(ranges: Ranges, lanes: Array, lanes_of_ranges: Array, times: Array) -> Array:
    """Return, for each time on its lane, the name of the innermost range of that lane; -1 for none."""
    found = np.full(len(times), NONE, np.int64)
    for lane, rows in _group(lanes):
        own = np.flatnonzero(lanes_of_ranges == lane)
        if len(own):
            own = own[np.lexsort((-ranges.end[own], ranges.start[own]))]
            bounds, names = _lay_out(ranges.start[own].tolist(), ranges.end[own].tolist(), ranges.name[own].tolist())
            found[rows] = names[np.searchsorted(bounds, times[rows], side="right")]
    return found


def _group(values: Array) -> Iterable[tuple[int, Array]]:
    """Yield each value and the rows that have it."""
    order = np.argsort(values, kind="stable")
    unique, first = np.unique(values[order], return_index=True)
    return zip(unique.tolist(), np.split(order, first[1:]), strict=True) if len(values) else ()


def _lay_out(starts: list[int], ends: list[int], names: list[int]) -> tuple[Array, Array]:
    """Return the times at which the innermost of ranges (sorted by start, then from long to short) changes, and the names.

    Between times number k-1 and k it is ``names[k]``. A range holds both its ends.
    """
    times: list[int] = []
    found = [NONE]
    open_ranges: list[tuple[int, int]] = []

    def close_before(time: float) -> None:
        while open_ranges and open_ranges[-1][0] < time:
            after = open_ranges.pop()[0] + 1
            # Those below that ended meanwhile, without being nested, end with it.
            while open_ranges and open_ranges[-1][0] < after:
                open_ranges.pop()
            times.append(after)
            found.append(open_ranges[-1][1] if open_ranges else NONE)

    for start, end, name in zip(starts, ends, names, strict=True):
        close_before(start)
        open_ranges.append((end, name))
        times.append(start)
        found.append(name)
    close_before(float("inf"))
    return np.array(times, np.int64), np.array(found, np.int64)
