"""What repeats in a trace without annotations: layers, by the order of computing kernels; nothing where it is not plain.

Confidence comes from exactness: the same functions in the same order, three times or more without a gap, in most of the
computation. Kernels of one function count as equal whatever their template arguments, since shapes differ between layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from counterflow.analysis.classes import IS_COMMUNICATION
from counterflow.analysis.intervals import subtract, unite
from counterflow.analysis.names import split_name
from counterflow.analysis.overlap import Device
from counterflow.analysis.phases import WITHOUT
from counterflow.analysis.trace import NONE
from counterflow.arrays import Array

# What a unit that repeats has at least and at most, and how often it does.
LEAST_KERNELS, MOST_KERNELS, LEAST_FUNCTIONS, LEAST_REPEATS = 6, 1500, 4, 3
# Beyond, the search takes seconds.
MOST_SEARCHED = 200_000
# Of the computation's time: what one unit covers at least; all of them; a forward and its backward.
LEAST_UNIT, LEAST_ALL, LEAST_LAYERS = 0.05, 0.6, 0.8
# A backward takes about twice its forward, three times with recomputation.
BACKWARD = (1.3, 4.0)


@dataclass(frozen=True)
class Repetition:
    """A unit of ``kernels`` that repeats ``repeats`` times or more in a row, in a row from each of ``starts`` on; nanoseconds.

    ``compute`` is its computation and ``exposed`` the exposed communication from its begin to its end, per unit.
    """

    name: str
    kernels: int
    repeats: int
    starts: tuple[int, ...]
    length: int
    compute: int
    exposed: int
    share: float


@dataclass(frozen=True)
class _Row:
    first: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        return self.first + self.period * self.repeats


def find_repetitions(device: Device) -> list[Repetition]:
    """Return what repeats on the stream that computes most, in order of time; nothing where phases are known or doubtful."""
    if device.trace.timeline is not None or any(phase.name != WITHOUT for phase in device.phases):
        return []
    rows = _order_kernels(device)
    if not 0 < len(rows) <= MOST_SEARCHED:
        return []
    work, own = device.trace.work, device.rows[rows]
    start, end, ids = work.start[own], work.end[own], _number_functions(device, own)
    found = _find_rows(ids, end - start)
    groups: dict[bytes, list[_Row]] = {}
    for row in sorted(found, key=lambda row: row.first):
        groups.setdefault(_make_key(ids[row.first : row.first + row.period]), []).append(row)
    repetitions = [_measure(device, members, start, end) for members in groups.values()]
    if sum(one.share for one in repetitions) < LEAST_ALL:
        return []
    return _name(repetitions, list(groups.values()))


def _order_kernels(device: Device) -> Array:
    """Return the computing kernels of the stream that computes most, in order of their starts."""
    work = device.trace.work
    rows = np.flatnonzero((device.kind_of != NONE) & ~IS_COMMUNICATION[device.kind_of])
    streams = work.stream[device.rows[rows]]
    times = {stream: int((work.end - work.start)[device.rows[rows[streams == stream]]].sum()) for stream in set(streams.tolist())}
    if not times:
        return rows
    rows = rows[streams == max(times, key=lambda stream: (times[stream], -stream))]
    order: Array = np.argsort(work.start[device.rows[rows]], kind="stable")
    ordered: Array = rows[order]
    return ordered


def _number_functions(device: Device, own: Array) -> Array:
    names = device.trace.names
    numbers: dict[str, int] = {}
    unique, place = np.unique(device.trace.work.name[own], return_inverse=True)
    found = [NONE if name == NONE else numbers.setdefault(split_name(names[name]).head, len(numbers)) for name in unique.tolist()]
    return np.array(found, np.int64)[place]


def _find_rows(ids: Array, times: Array) -> list[_Row]:
    """Return rows of units that repeat, of the shortest period first; none shares a kernel with another."""
    ids, total = ids.copy(), max(int(times.sum()), 1)
    rows: list[_Row] = []
    covered = np.concatenate([[0], np.cumsum(times)])
    for period in range(LEAST_KERNELS, min(MOST_KERNELS, len(ids) // LEAST_REPEATS) + 1):
        same = ids[:-period] == ids[period:]
        if np.count_nonzero(same) < period * (LEAST_REPEATS - 1):
            continue
        found = [
            row for row in _list_runs(same, period) if len(np.unique(ids[row.first : row.first + period])) >= LEAST_FUNCTIONS
        ]
        if sum(int(covered[row.end] - covered[row.first]) for row in found) < LEAST_UNIT * total:
            continue
        for row in found:
            # Numbers of their own: what is in a row matches nothing any more.
            ids[row.first : row.end] = -2 - np.arange(row.first, row.end)
        rows += found
    return rows


def _list_runs(same: Array, period: int) -> Iterator[_Row]:
    """Yield where each kernel equals the one a period later for long enough."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    free = 0
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        # The row before may reach a period beyond its last match.
        first = max(begin, free)
        if (repeats := (end - first) // period + 1) >= LEAST_REPEATS:
            yield _Row(first, period, repeats)
            free = first + period * repeats


def _make_key(unit: Array) -> bytes:
    """Return one key for a unit's functions in any order: a row may begin anywhere in its unit."""
    return np.sort(unit).tobytes()


def _measure(device: Device, rows: Sequence[_Row], start: Array, end: Array) -> Repetition:
    units = sum(row.repeats for row in rows)
    begins, ends = start[[row.first for row in rows]], np.array([end[row.first : row.end].max() for row in rows])
    spans = unite(begins, ends)
    exposed = subtract(device.communication, device.compute).intersect(spans)
    compute = device.compute.intersect(spans)
    return Repetition(
        "", rows[0].period, min(row.repeats for row in rows), tuple((begins - device.first).tolist()), spans.length // units,
        compute // units, exposed // units, compute / max(device.compute.length, 1),
    )  # fmt: skip


def _name(repetitions: list[Repetition], groups: Sequence[Sequence[_Row]]) -> list[Repetition]:
    """Call two units forward and backward of layers where they take turns, repeat alike and the second takes longer."""
    names = [f"unit {number}" for number in range(1, len(repetitions) + 1)]
    if len(groups) == 2:
        (one, two), (forward, backward) = groups, repetitions
        alike = len({row.repeats for row in (*one, *two)}) == 1 and len(one) == len(two)
        turns = all(f.end <= b.first for f, b in zip(one, two, strict=False)) and all(
            b.end <= f.first for b, f in zip(two, one[1:], strict=False)
        )
        longer = BACKWARD[0] <= backward.compute / max(forward.compute, 1) <= BACKWARD[1]
        if alike and turns and longer and forward.share + backward.share >= LEAST_LAYERS:
            names = ["forward of a layer", "backward of a layer"]
    return [replace(one, name=name) for name, one in zip(names, repetitions, strict=True)]
