"""Profiled steps for Perfetto (https://ui.perfetto.dev): a track per kind of kernel, and one of how the window was spent."""

import heapq
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from counterflow.analysis.overlap import Device
from counterflow.analysis.phases import WITHOUT
from counterflow.analysis.summary import summarize
from counterflow.analysis.trace import NONE
from counterflow.arrays import Array
from counterflow.report.lanes import NAMES, Lane, check_size, find_offsets, list_lanes
from counterflow.report.overlap_text import name_device

Event = dict[str, Any]


def render_findings_trace(devices: Sequence[Device]) -> str:
    """Return a trace in Chrome's JSON format: a process per device, a track per kind of kernel; times in microseconds.

    Slices of one track do not overlap: where kernels of a kind do, it has several tracks. Raises `TraceError` for more kernels
    than a trace can hold.
    """
    check_size(devices, "a trace")
    offsets, one_clock = find_offsets(devices)
    head = {
        "displayTimeUnit": "ns",
        "otherData": {"clocks": "one" if one_clock else "each device begins at zero"}
        | {name_device(device): summarize(device) for device in devices},
    }
    # One event a line: a trace of a million slices stays readable with line tools.
    events = ",\n".join(
        json.dumps(event, separators=(",", ":"), allow_nan=False)
        for process, (device, offset) in enumerate(zip(devices, offsets, strict=True))
        for event in _list_events(process, device, offset)
    )
    return f'{json.dumps(head)[:-1]}, "traceEvents": [\n{events}\n]}}\n'


def _list_events(process: int, device: Device, offset: int) -> Iterator[Event]:
    yield _describe("process_name", process, 0, name=name_device(device))
    yield _describe("process_sort_index", process, 0, sort_index=process)
    window, *lanes = list_lanes(device)
    thread = 0
    yield from _name_track(process, thread, "how the window was spent")
    for kind, start, end in zip(window.kinds.tolist(), window.start.tolist(), window.end.tolist(), strict=True):
        yield _slice(process, thread, NAMES[kind], NAMES[kind], start + offset, end - start, {})
    for kind, rows, start, end in _join_lanes(lanes):
        tracks = pack_tracks(start, end)
        for track in range(int(tracks.max()) + 1):
            thread += 1
            yield from _name_track(process, thread, NAMES[kind] if not track else f"{NAMES[kind]} ({track + 1})")
            own = np.flatnonzero(tracks == track)
            yield from _list_kernels(process, thread, device, NAMES[kind], rows[own], start[own] + offset, end[own] - start[own])


def _join_lanes(lanes: Sequence[Lane]) -> Iterator[tuple[int, Array, Array, Array]]:
    """Yield each kind with its rows, starts and ends in order of time."""
    if not lanes:
        return
    kinds, rows, starts, ends = (
        np.concatenate([getattr(lane, name) for lane in lanes]) for name in ("kinds", "rows", "start", "end")
    )
    order = np.lexsort((ends, starts))
    for kind in np.unique(kinds).tolist():
        own = order[kinds[order] == kind]
        yield kind, rows[own], starts[own], ends[own]


def pack_tracks(starts: Array, ends: Array) -> Array:
    """Return the track of each interval, given in order of starts: the first that is free, so that none of a track overlap."""
    tracks = np.zeros(len(starts), np.int64)
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    for n, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        tracks[n] = track = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, track))
    return tracks


def _list_kernels(
    process: int, thread: int, device: Device, kind: str, rows: Array, starts: Array, lengths: Array
) -> Iterator[Event]:
    trace = device.trace
    names, streams = trace.work.name[device.rows[rows]].tolist(), trace.work.stream[device.rows[rows]].tolist()
    phases = device.phase_of[rows].tolist()
    for name, stream, phase, start, length in zip(names, streams, phases, starts.tolist(), lengths.tolist(), strict=True):
        args = {
            "phase": WITHOUT if phase == NONE else trace.names[phase],
            "stream": trace.streams[stream] if stream != NONE else None,
        }
        yield _slice(process, thread, trace.names[name] if name != NONE else kind, kind, start, length, args)


def _slice(process: int, thread: int, name: str, kind: str, start: int, length: int, args: dict[str, Any]) -> Event:
    times = {"ts": start / 1000, "dur": length / 1000}
    return {"ph": "X", "name": name, "cat": kind, "pid": process, "tid": thread, **times, "args": args}


def _name_track(process: int, thread: int, name: str) -> Iterator[Event]:
    yield _describe("thread_name", process, thread, name=name)
    yield _describe("thread_sort_index", process, thread, sort_index=thread)


def _describe(what: str, process: int, thread: int, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": args}
