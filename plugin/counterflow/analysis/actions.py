"""Timelines of actions as traces: the records of a run, and what ``schedule show --trace`` wrote of a simulation.

A rank is a device. An action is a kernel of kind ``action``, less the time for which it waited for a communication of its own.
"""

from collections.abc import Iterable, Sequence
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
from counterflow.schedule.actions import PAIR
from counterflow.schedule.timeline import Span, Timeline, find_last_step, load_record

# As families.toml knows them.
ACTION, COMMUNICATION = "counterflow: action", "counterflow: communication"
# What stands for an action in a phase's name: a whole backward counts as one part.
LETTERS = {"F": "F", "I": "B", "B": "B", "W": "W"}
NANOSECONDS = 1e9


def name_phase(kind: str, stage: int) -> str:
    """Return the name of the phase that an action of a stage is in: ``stage 2 (F)``; I and B are ``(B)``."""
    return f"stage {stage} ({LETTERS[kind]})"


def read_record(path: Path) -> list[Trace]:
    """Return a trace per pipeline rank of the last step in a folder of ``--cf-record``; raises `ScheduleError`."""
    step = find_last_step(path)
    timeline = load_record(path, step)
    return split_timeline(timeline, str(path), "record", str(step))


def split_timeline(timeline: Timeline, path: str, form: str, step: str, unit: float = NANOSECONDS) -> list[Trace]:
    """Return a trace per rank of a timeline whose unit is so many nanoseconds."""
    traces = []
    for rank in range(timeline.ranks):
        spans = [span for span in timeline.spans if span.rank == rank]
        waits = [(one.waited, one.end) for one in timeline.communications if one.rank == rank]
        running = [(one.issued, one.end) for one in timeline.communications if one.rank == rank]
        traces.append(_make_trace(spans, waits, running, path, form, rank, step, unit, timeline))
    return traces


def _make_trace(
    spans: Sequence[Span],
    waits: Sequence[tuple[float, float]],
    running: Sequence[tuple[float, float]],
    path: str,
    form: str,
    rank: int,
    step: str,
    unit: float,
    timeline: Timeline,
) -> Trace:
    names, work, ranges = Index(), Table(**WORK_TYPES), Table(**RANGE_TYPES)
    pieces = [(ACTION, *piece) for span in spans for piece in _cut(span.start, span.end, waits)]
    pieces += [(COMMUNICATION, *piece) for piece in running]
    lanes = [int(name == COMMUNICATION) for name, _, _ in pieces]
    fixed = {"device": 0, "what": KERNEL, "process": NONE, "correlation": NONE, "collective": NONE, "group": NONE}
    work.add(
        name=names.number(name for name, _, _ in pieces),
        stream=lanes,
        start=[round(start * unit) for _, start, _ in pieces],
        end=[round(end * unit) for _, _, end in pieces],
        **{name: np.full(len(pieces), value) for name, value in fixed.items()},
    )
    labels = [(names[_name_span(span)], round(span.start * unit), round(span.end * unit)) for span in spans]
    for lane in (0, 1):
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
        events=len(spans),
        rank=rank,
        timeline=timeline,
        steps=frozenset([step]) if step else frozenset(),
    )


def _name_span(span: Span) -> str:
    if span.action.kind == PAIR:
        return f"pair of stages {' and '.join(str(part.stage) for part in span.action.parts)}"
    return name_phase(span.action.kind, span.action.stage)


def _cut(start: float, end: float, waits: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
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
