"""Traces of runs on a CPU: the annotations of ``--cf-profile`` say what computes, and the library's what communicates.

A device is the rank. It computes where an operator runs that calls no other, and in the rest of an action but where a collective
is under way: there it waits, in an operator that has called the collective or in none. Messages of the pipeline are under way
while their rank computes, so they take nothing from an action.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from counterflow.analysis.actions import NANOSECONDS, Running, make_trace
from counterflow.analysis.blocks import read_blocks
from counterflow.analysis.classes import classify_name
from counterflow.analysis.events import Document, read_events
from counterflow.analysis.intervals import Union, subtract, unite
from counterflow.analysis.kineto import read_spans
from counterflow.analysis.phases import find_innermost
from counterflow.analysis.trace import NONE, Index, Ranges, Table, Trace
from counterflow.arrays import Array
from counterflow.schedule.annotations import Annotation, read_annotation, read_layer
from counterflow.schedule.timeline import Span, Timeline

# What a CPU run communicates by, as its annotations are called, and operators that only issue it.
LIBRARY, ISSUING = "gloo:", ("c10d::", "record_param_comms", "gloo:", "counterflow")
MESSAGES = "send_recv"
# Operators that issue a collective: those that issue a message have names of other letters.
COLLECTIVES = ("c10d::all", "c10d::_all", "c10d::broadcast", "c10d::reduce", "c10d::_reduce", "c10d::gather", "c10d::scatter")


def has_actions(trace: Trace) -> bool:
    """Tell whether a trace has annotations of actions."""
    return any(read_annotation(name) is not None for name in trace.names)


def lay_out_host(trace: Trace) -> Trace:
    """Return a trace without kernels again, its actions as kernels; reads the file a second time for the operators."""
    ranges = trace.ranges
    found = [read_annotation(trace.names[name]) for name in ranges.name.tolist()]
    rows = [(one, start, end) for one, start, end in zip(found, ranges.start.tolist(), ranges.end.tolist(), strict=True) if one]
    rows.sort(key=lambda row: row[1])
    noted = [
        (trace.names[name], start, end)
        for name, start, end in zip(ranges.name.tolist(), ranges.start.tolist(), ranges.end.tolist(), strict=True)
    ]
    running = [row for row in noted if row[0].startswith(LIBRARY)]
    layers = [row for row in noted if read_layer(row[0]) is not None]
    collectives = [row for row in running if classify_name(row[0]) != MESSAGES]
    operators, issues = _read_operators(Path(trace.path))
    waits = subtract(_unite_rows(collectives), operators)
    pieces = list(zip(waits.starts.tolist(), waits.ends.tolist(), strict=True))
    rank = trace.rank if trace.rank is not None else rows[0][0].rank
    actions = [(one.action, start, end) for one, start, end in rows]
    places = (layers, _place_collectives(collectives, issues, layers))
    made = make_trace(actions, pieces, running, trace.path, "host", rank, places)
    return replace(
        made,
        events=trace.events,
        world_size=trace.world_size,
        base=trace.base,
        cut=trace.cut,
        timeline=_make_timeline(rows),
        pipeline=rows[0][0].pipeline,
        steps=frozenset(str(one.step) for one, _, _ in rows),
    )


def _unite_rows(rows: list[tuple[str, int, int]]) -> Union:
    return unite(np.array([start for _, start, _ in rows], np.int64), np.array([end for _, _, end in rows], np.int64))


def _place_collectives(collectives: list[Running], issues: Array, layers: list[Running]) -> list[Running]:
    """Return an annotation of its layer at the start of each collective: of the one that was open when it was issued.

    The parts of an overlapped pair hand over once they have issued one: where it runs another layer is open.
    """
    if not layers or not collectives:
        return []
    starts = np.array([start for _, start, _ in collectives], np.int64)
    place = np.searchsorted(issues, starts, side="right") - 1
    times = np.where(place < 0, starts, np.concatenate([issues, [0]])[place])
    numbers, ends = Index(), [(start, end) for _, start, end in layers]
    columns = (numbers.number(name for name, _, _ in layers), *zip(*ends, strict=True))
    name, start, end = (np.array(column, np.int64) for column in columns)
    lane = np.zeros(len(layers), np.int64)
    found = find_innermost(Ranges(lane, lane, name, start, end), np.zeros(len(times), np.int64), lane, times)
    names = list(numbers)
    return [(names[name], start, start) for name, start in zip(found.tolist(), starts.tolist(), strict=True) if name != NONE]


def _read_operators(path: Path) -> tuple[Union, Array]:
    """Return when operators run that call no other, but those that only issue communication, and when collectives are issued."""
    table, threads = Table(thread=np.int32, issues=np.int8, start=np.int64, end=np.int64), Index()
    times: list[int] = []
    for events in read_events(read_blocks(path), Document()):
        chosen = [event for event in events if event.ph == "X" and event.cat == "cpu_op"]
        start, length, _, good = read_spans(chosen)
        issuing = np.array([str(event.name).startswith(COLLECTIVES) for event in chosen], bool)
        times += start[good & issuing].tolist()
        table.add(
            thread=np.array([threads[event.tid] for event in chosen], np.int32)[good],
            issues=np.array([str(event.name).startswith(ISSUING) for event in chosen], np.int8)[good],
            start=start[good],
            end=(start + length)[good],
        )
    columns = table.close()
    order = np.lexsort((-columns["end"], columns["start"], columns["thread"]))
    thread, issues, start, end = (columns[name][order] for name in ("thread", "issues", "start", "end"))
    # The next of the thread starts within one that calls it.
    calls = (thread[1:] == thread[:-1]) & (start[1:] < end[:-1])
    leaves = ~np.concatenate([calls, [False]])[: len(start)] & (issues == 0)
    return unite(start[leaves], end[leaves]), np.array(sorted(times), np.int64)


def _make_timeline(rows: list[tuple[Annotation, int, int]]) -> Timeline:
    """Return the last step's spans, in seconds."""
    last = max(one.step for one, _, _ in rows)
    spans = [Span(one.rank, one.action, s / NANOSECONDS, e / NANOSECONDS) for one, s, e in rows if one.step == last]
    return Timeline(tuple(spans))
