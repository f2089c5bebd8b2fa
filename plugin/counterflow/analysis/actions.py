"""Timelines of actions as traces: the records of a run, and what ``schedule show --trace`` wrote of a simulation.

A rank is a device. An action is a kernel of kind ``action``, less the time for which it waited for a communication of its own.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from counterflow.analysis.trace import (
    KERNEL,
    LAUNCH_TYPES,
    NONE,
    RANGE_TYPES,
    WORK_TYPES,
    Index,
    Launches,
    Ranges,
    Table,
    Trace,
    Work,
)
from counterflow.schedule.actions import PAIR, Action
from counterflow.schedule.annotations import name_phase
from counterflow.schedule.timeline import Timeline, find_last_step, load_record

# As families.toml knows them.
ACTION, COMMUNICATION = "counterflow: action", "counterflow: communication"
NANOSECONDS = 1e9
# A communication under way: its name and when, in nanoseconds. An annotation of a layer has the same form.
Running = tuple[str, int, int]
Layers = Sequence[Running]


def read_record(path: Path) -> list[Trace]:
    """Return a trace per pipeline rank of the last step in a folder of ``--cf-record``; raises `ScheduleError`."""
    step = find_last_step(path)
    timeline = load_record(path, step)
    return split_timeline(timeline, str(path), "record", str(step))


def split_timeline(timeline: Timeline, path: str, form: str, step: str, unit: float = NANOSECONDS) -> list[Trace]:
    """Return a trace per rank of a timeline whose unit is so many nanoseconds."""

    def scale(begin: float, end: float) -> tuple[int, int]:
        return round(begin * unit), round(end * unit)

    traces = []
    for rank in range(timeline.ranks):
        rows = [(span.action, *scale(span.start, span.end)) for span in timeline.spans if span.rank == rank]
        own = [one for one in timeline.communications if one.rank == rank]
        waits = [scale(one.waited, one.end) for one in own]
        running = [(COMMUNICATION, *scale(one.issued, one.end)) for one in own]
        trace = make_trace(rows, waits, running, path, form, rank)
        traces.append(replace(trace, timeline=timeline, steps=frozenset([step]) if step else frozenset()))
    return traces


def make_trace(
    rows: Sequence[tuple[Action, int, int]],
    waits: Sequence[tuple[int, int]],
    running: Sequence[Running],
    path: str,
    form: str,
    rank: int,
    layers: Sequence[Layers] = ((), ()),
) -> Trace:
    """Return the trace of a rank's actions, of its waits in them and of its communications, in nanoseconds.

    ``layers`` are annotations of layers: around what the actions compute, and at the starts of communications.
    """
    names, work, ranges = Index(), Table(**WORK_TYPES), Table(**RANGE_TYPES)
    free = [piece for _, start, end in rows for piece in _cut(start, end, waits)]
    pieces = [(ACTION, *piece) for piece in _split(free, layers[0])]
    lanes = [0] * len(pieces) + [1] * len(running)
    pieces += running
    fixed = {"device": 0, "what": KERNEL, "process": NONE, "correlation": NONE, "collective": NONE, "group": NONE}
    work.add(
        name=names.number(name for name, _, _ in pieces),
        stream=lanes,
        start=[start for _, start, _ in pieces],
        end=[end for _, _, end in pieces],
        **{name: np.full(len(pieces), value) for name, value in fixed.items()},
    )
    actions = [(_name_action(action), start, end) for action, start, end in rows]
    for lane, notes in enumerate(layers):
        labels = [(names[name], start, end) for name, start, end in (*actions, *notes)]
        ranges.add(
            scope=[0] * len(labels),
            lane=[lane] * len(labels),
            name=[name for name, _, _ in labels],
            start=[start for _, start, _ in labels],
            # A range holds both its ends; the next action's kernel starts where this one ends.
            end=[max(start, end - 1) for _, start, end in labels],
        )
    return Trace(
        path=path,
        form=form,
        names=tuple(names),
        devices=(rank,),
        streams=(0, 1),
        collectives=(),
        groups=(),
        work=Work(**work.close()),
        launches=Launches(**Table(**LAUNCH_TYPES).close()),
        ranges=Ranges(**Table(**RANGE_TYPES).close()),
        gpu_ranges=Ranges(**ranges.close()),
        events=len(rows),
        rank=rank,
    )


def _name_action(action: Action) -> str:
    if action.kind == PAIR:
        return f"pair of stages {' and '.join(str(part.stage) for part in action.parts)}"
    return name_phase(action.kind, action.stage)


def _split(pieces: Iterable[tuple[int, int]], layers: Layers) -> Iterator[tuple[int, int]]:
    """Yield what is left of actions again, cut where a layer begins or ends."""
    bounds = sorted({bound for _, start, end in layers for bound in (start, end)})
    for start, end in pieces:
        inner = bounds[bisect_right(bounds, start) : bisect_left(bounds, end)]
        yield from pairwise((start, *inner, end))


def _cut(start: int, end: int, waits: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what is left of an interval without some others."""
    pieces, begin = [], start
    for first, last in sorted(waits):
        if last > begin and first < end:
            if first > begin:
                pieces.append((begin, first))
            begin = min(last, end)
    if begin < end or not pieces:
        pieces.append((begin, end))
    return pieces
