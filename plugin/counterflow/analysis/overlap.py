"""Where one device's time went: computation, communication hidden behind it and exposed, by kind and by phase.

Every figure is the measure of a union of intervals on one device (docs/analysis.md has the definitions and a picture).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from counterflow.analysis.classes import IS_COMMUNICATION, KINDS, UNCLASSIFIED, classify
from counterflow.analysis.intervals import Union, claim, unite
from counterflow.analysis.layers import Layer, find_layers, sort_layers
from counterflow.analysis.phases import WITHOUT, find_phases, has_annotations
from counterflow.analysis.trace import KERNEL, NONE, Label, Trace
from counterflow.arrays import Array
from counterflow.schedule.annotations import read_layer


@dataclass(frozen=True)
class Share:
    """Kernels of one kind: how many, the union of their runs, and what of it is exposed, in nanoseconds."""

    kernels: int
    time: int
    exposed: int


@dataclass(frozen=True)
class Phase:
    """An annotation's kernels: unions of its computation and its communication, and what of that is exposed; nanoseconds.

    ``causes`` are the exposed nanoseconds by the kernel that was waited for: of each instant, the one that ended last.
    """

    name: str
    kernels: int
    compute: int
    communication: int
    exposed: int
    causes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """One device of one trace; times in nanoseconds.

    ``rows`` are its rows of GPU work, ``kinds`` and ``phases`` those of each. ``owned`` shares out the window: each nanosecond of
    it to one kind of kernel, to ``copies`` or to ``idle``.
    """

    label: Label
    trace: Trace
    rows: Array
    kind_of: Array
    phase_of: Array
    first: int
    last: int
    busy: int
    compute: Union
    communication: Union
    exposed: int
    kinds: Mapping[str, Share]
    phases: tuple[Phase, ...]
    layers: tuple[Layer, ...]
    owned: Mapping[tuple[str, str], int]
    copies: tuple[int, int]
    left_out: Mapping[str, int]
    unclassified: tuple[tuple[str, int, int], ...]
    clashes: tuple[int, int]
    linked: float

    @property
    def window(self) -> int:
        """From the first kernel's start to the last one's end."""
        return self.last - self.first

    @property
    def idle(self) -> int:
        """The part of the window in which nothing runs, no copy either."""
        return self.window - self.busy

    @property
    def hidden(self) -> int:
        """Communication with computation at the same time."""
        return self.communication.length - self.exposed

    @property
    def kernels(self) -> int:
        """How many kernels ran."""
        return int((self.trace.work.what[self.rows] == KERNEL).sum())


def analyze_trace(trace: Trace, families: Any = ()) -> list[Device]:
    """Return the devices of a trace that ran kernels, by label; ``families`` come before the project's own."""
    kind_of, (phase_of, launch) = classify(trace, families), find_phases(trace)
    layer_of = find_layers(trace, launch)
    numbers = np.unique(trace.work.device[trace.work.what == KERNEL]).tolist()
    devices = []
    for number in sorted(numbers, key=lambda number: _sort_label(trace.devices[number] if number != NONE else None)):
        rows = np.flatnonzero(trace.work.device == number)
        label = trace.devices[number] if number != NONE else None
        columns = (column[rows] for column in (kind_of, phase_of, layer_of, launch))
        devices.append(_analyze_device(trace, label, rows, *columns))
    return devices


def _sort_label(label: Label) -> tuple[bool, float, str]:
    return (True, 0.0, str(label)) if isinstance(label, str) or label is None else (False, float(label), "")


def _analyze_device(
    trace: Trace, label: Label, rows: Array, kind_of: Array, phase_of: Array, layer_of: Array, launch: Array
) -> Device:
    start, end = trace.work.start[rows], trace.work.end[rows]
    is_kernel, communicates = trace.work.what[rows] == KERNEL, IS_COMMUNICATION[kind_of]
    computes = is_kernel & ~communicates
    first, last = int(start[is_kernel].min()), int(end[is_kernel].max())
    compute, communication = unite(start[computes], end[computes]), unite(start[communicates], end[communicates])
    busy = unite(np.clip(start, first, last), np.clip(end, first, last))
    everything = _Runs(trace, rows, start, end, kind_of, phase_of, layer_of, computes, communicates, compute)
    copies = unite(start[~is_kernel], end[~is_kernel])
    return Device(
        label=label,
        trace=trace,
        rows=rows,
        kind_of=kind_of,
        phase_of=phase_of,
        first=first,
        last=last,
        busy=busy.length,
        compute=compute,
        communication=communication,
        exposed=communication.length - communication.intersect(compute),
        kinds=everything.sum_kinds(),
        phases=everything.sum_phases() if has_annotations(trace) else (),
        layers=everything.sum_layers(),
        owned=everything.share_window(busy, last - first),
        copies=(int((~is_kernel).sum()), copies.length),
        left_out={reason: count for (device, reason), count in trace.left_out.items() if device == label},
        unclassified=everything.list_unclassified(),
        clashes=_find_clashes(trace, rows[is_kernel]),
        linked=float((launch != NONE).mean()),
    )


@dataclass(frozen=True)
class _Runs:
    """A device's runs as columns, with what tells computation from communication."""

    trace: Trace
    rows: Array
    start: Array
    end: Array
    kind_of: Array
    phase_of: Array
    layer_of: Array
    computes: Array
    communicates: Array
    compute: Union

    def _measure(self, chosen: Array) -> tuple[int, int]:
        """Return the union of some runs, and what of it is not computation."""
        union = unite(self.start[chosen], self.end[chosen])
        return union.length, union.length - union.intersect(self.compute)

    def sum_kinds(self) -> dict[str, Share]:
        """Return each kind's share, the largest first."""
        shares = {}
        for kind in np.unique(self.kind_of[self.kind_of != NONE]).tolist():
            chosen = np.flatnonzero(self.kind_of == kind)
            shares[KINDS[kind]] = Share(len(chosen), *self._measure(chosen))
        return dict(sorted(shares.items(), key=lambda item: -item[1].time))

    def sum_phases(self) -> tuple[Phase, ...]:
        """Return the phases, those with most exposed communication first."""
        causes = self._find_causes()
        phases = [
            Phase(WITHOUT if value == NONE else self.trace.names[value], *figures, causes.get(value, {}))
            for value, figures in self._measure_groups(self.phase_of)
        ]
        return tuple(sorted(phases, key=lambda phase: (-phase.exposed, -phase.communication, -phase.compute, phase.name)))

    def sum_layers(self) -> tuple[Layer, ...]:
        """Return the annotated layers in their order."""
        if (self.layer_of == NONE).all():
            return ()
        layers = []
        for value, figures in self._measure_groups(self.layer_of):
            if value != NONE and (known := read_layer(self.trace.names[value])) is not None:
                layers.append(Layer(*known, *figures))
        return sort_layers(layers)

    def _measure_groups(self, groups: Array) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Yield each group of runs: kernels, unions of its computation and of its communication, and what of that is exposed."""
        order = np.argsort(groups, kind="stable")
        values, first = np.unique(groups[order], return_index=True)
        for value, members in zip(values.tolist(), np.split(order, first[1:]), strict=True):
            computing, communicating = members[self.computes[members]], members[self.communicates[members]]
            communication, exposed = self._measure(communicating)
            yield value, (len(computing) + len(communicating), self._measure(computing)[0], communication, exposed)

    def _claim_exposed(self) -> tuple[Array, Array]:
        """Return the communicating runs, and the exposed nanoseconds that each answers for."""
        chosen = np.flatnonzero(self.communicates)
        starts, ends = claim(self.start[chosen], self.end[chosen])
        return chosen, ends - starts - self.compute.overlap(starts, ends)

    def _find_causes(self) -> dict[int, dict[str, int]]:
        causes: dict[int, dict[str, int]] = {}
        chosen, exposed = self._claim_exposed()
        names = self.trace.work.name[self.rows[chosen]]
        for phase, name, time in zip(self.phase_of[chosen].tolist(), names.tolist(), exposed.tolist(), strict=True):
            if time:
                of_phase = causes.setdefault(phase, {})
                of_phase[self.trace.names[name]] = of_phase.get(self.trace.names[name], 0) + time
        return causes

    def share_window(self, busy: Union, window: int) -> dict[tuple[str, str], int]:
        """Share out the window by kind and phase, no nanosecond twice; the rest is copies, and what is idle."""
        owned: dict[tuple[str, str], int] = {}
        chosen = np.flatnonzero(self.computes)
        starts, ends = claim(self.start[chosen], self.end[chosen])
        for runs, times in ((chosen, ends - starts), self._claim_exposed()):
            keys = self.kind_of[runs].astype(np.int64) * (len(self.trace.names) + 1) + self.phase_of[runs] + 1
            unique, place = np.unique(keys, return_inverse=True)
            sums = np.zeros(len(unique), np.int64)
            np.add.at(sums, place, times)
            for key, time in zip(unique.tolist(), sums.tolist(), strict=True):
                kind, phase = divmod(key, len(self.trace.names) + 1)
                owned[KINDS[kind], self.trace.names[phase - 1] if phase else WITHOUT] = time
        owned["copies", WITHOUT] = busy.length - sum(owned.values())
        owned["idle", WITHOUT] = window - busy.length
        return owned

    def list_unclassified(self) -> tuple[tuple[str, int, int], ...]:
        """Return name, count and union of the kernels that no family knows, by time."""
        chosen = np.flatnonzero(self.kind_of == KINDS.index(UNCLASSIFIED))
        names = self.trace.work.name[self.rows[chosen]]
        found = []
        for name in np.unique(names).tolist():
            own = chosen[names == name]
            found.append((self.trace.names[name], len(own), self._measure_alone(own)))
        return tuple(sorted(found, key=lambda row: (-row[2], row[0])))

    def _measure_alone(self, chosen: Array) -> int:
        return unite(self.start[chosen], self.end[chosen]).length


def _find_clashes(trace: Trace, rows: Array) -> tuple[int, int]:
    """Return how many kernels run past the start of the next of their stream, and for how long in all.

    A few are programmatic dependent launches; many, on ROCm, are broken durations.
    """
    work = trace.work
    order = rows[np.lexsort((work.end[rows], work.start[rows], work.stream[rows]))]
    same = work.stream[order][1:] == work.stream[order][:-1]
    past = np.where(same, work.end[order][:-1] - work.start[order][1:], 0)
    return int((past > 0).sum()), int(past[past > 0].sum())
