"""Which layer of the model a kernel belongs to, by the annotations of ``--cf-profile``."""

from dataclasses import dataclass

import numpy as np

from counterflow.analysis.phases import find_innermost, join, keep_named
from counterflow.analysis.trace import NONE, Trace
from counterflow.arrays import Array
from counterflow.schedule.annotations import read_layer


@dataclass(frozen=True)
class Layer:
    """A layer's forward (F), backward (B) or weight gradients (W): as a phase, in nanoseconds over the window."""

    name: str
    part: str
    kernels: int
    compute: int
    communication: int
    exposed: int


def find_layers(trace: Trace, launch: Array) -> Array:
    """Return, for each row of GPU work, the number of its layer's annotation, -1 where there is none.

    A layer's kernels are launched by the thread that has its annotation open: in an overlapped pair another thread has another
    layer open. Without a launch it is the annotation on the GPU, as of a phase.
    """
    found = np.full(len(launch), NONE, np.int64)
    named = np.array([read_layer(name) is not None for name in trace.names], bool)
    if not named.any():
        return found
    ranges, launched = keep_named(trace.ranges, named), np.flatnonzero(launch != NONE)
    calls, rows = trace.launches, launch[launched]
    lanes = join(calls.process[rows], calls.thread[rows])
    found[launched] = find_innermost(ranges, lanes, join(ranges.scope, ranges.lane), calls.start[rows])
    ranges, loose = keep_named(trace.gpu_ranges, named), np.flatnonzero(launch == NONE)
    lanes = join(trace.work.device[loose], trace.work.stream[loose])
    found[loose] = find_innermost(ranges, lanes, join(ranges.scope, ranges.lane), trace.work.start[loose])
    return found


def sort_layers(layers: list[Layer]) -> tuple[Layer, ...]:
    """Return layers in the order of their numbers, those that have words in their names last, each F, B, W."""
    return tuple(sorted(layers, key=lambda one: (*_find_place(one.name), "FBW".index(one.part))))


def _find_place(name: str) -> tuple[str, int, str]:
    words, _, number = name.rpartition(" ")
    return (words, int(number), "") if number.isascii() and number.isdigit() and len(number) < 10 else ("~", 0, name)
