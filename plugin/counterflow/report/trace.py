"""A trace in Chrome's JSON format, for Perfetto (https://ui.perfetto.dev) and chrome://tracing.

Format: the Trace Event Format document of the Chromium project; times are in microseconds.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from counterflow.report.picture import MAX_SPANS, Picture, prepare_pictures
from counterflow.schedule.actions import Action

MICROSECONDS_PER_UNIT = 1000.0
Event = dict[str, Any]


def render_trace(pictures: Sequence[Picture]) -> str:
    """Return the trace as JSON: a process per picture, a thread per rank, one unit of the timeline shown as 1 ms.

    An overlapped pair is one slice with its F and its B, of the same length, nested in it. What is recorded of how they shared
    the rank is nested in these: slices of categories ``computation`` and ``waiting``; communications have two threads of their
    own per rank, those of backwards apart, below the ranks. Idle spans are slices of category ``idle`` with their reason; a
    rank's reductions have a thread of their own, below the ranks. Counters per rank hold live
    activations and queued weight gradients, in micro-batches of 1/P of the model. Raises `CounterflowError` for no picture, one
    without spans, or more than 2,000,000 spans in all.
    """
    pictures = prepare_pictures(pictures, MAX_SPANS, "a trace")
    head = {
        "displayTimeUnit": "ms",
        "otherData": {
            "time": "one unit of the timeline (of the costs where simulated, a second where recorded) is shown as 1 ms",
            "memory": "live activations and queued weight gradients in micro-batches of 1/P of the model",
        }
        | {f"{number}: {picture.title}": picture.summarise() for number, picture in enumerate(pictures)},
    }
    # One event a line: a trace of a million slices stays readable with line tools.
    events = ",\n".join(
        json.dumps(event, separators=(",", ":"), allow_nan=False)
        for number, picture in enumerate(pictures)
        for event in _list_events(number, picture)
    )
    return f'{json.dumps(head)[:-1]}, "traceEvents": [\n{events}\n]}}\n'


def _list_events(process: int, picture: Picture) -> Iterator[Event]:
    yield _describe("process_name", process, 0, name=picture.title)
    yield _describe("process_sort_index", process, 0, sort_index=process)
    for rank in range(picture.table.ranks):
        yield _describe("thread_name", process, rank, name=f"rank {rank}")
        yield _describe("thread_sort_index", process, rank, sort_index=rank)
    yield from _list_actions(process, picture)
    yield from _list_sharing(process, picture)
    yield from _list_reductions(process, picture)
    yield from _list_idle(process, picture)
    yield from _list_counters(process, picture)


def _list_actions(process: int, picture: Picture) -> Iterator[Event]:
    for rank, row in enumerate(picture.split_ranks()):
        for span in row:
            parts = list(span.action.singles())
            times = _time(span.start, span.end)
            if len(parts) > 1:
                name = " & ".join(map(_name, parts))
                yield _slice(process, rank, name, "pair", times, {"action": str(span.action)})
            for part in parts:
                yield _slice(process, rank, _name(part), part.kind, times, _explain(picture, part))


def _list_reductions(process: int, picture: Picture) -> Iterator[Event]:
    """They run beside the actions, so each rank's have a thread of their own."""
    for rank, row in enumerate(picture.split_reductions()):
        thread = picture.table.ranks + rank
        if row:
            yield _describe("thread_name", process, thread, name=f"reductions of rank {rank}")
            yield _describe("thread_sort_index", process, thread, sort_index=thread)
        for span in row:
            args = {"action": str(span.action), "stage": span.action.stage}
            yield _slice(process, thread, f"R stage {span.action.stage}", "R", _time(span.start, span.end), args)


def _list_sharing(process: int, picture: Picture) -> Iterator[Event]:
    """One part of a pair has the rank at a time; communications of the two may be under way together."""
    for rank, row in enumerate(picture.split_sharing()):
        threads = {way: 2 * (picture.table.ranks + rank) + n for n, way in enumerate(("forwards", "backwards"))}
        for way, thread in threads.items() if row else ():
            yield _describe("thread_name", process, thread, name=f"communications of rank {rank}, {way}")
            yield _describe("thread_sort_index", process, thread, sort_index=thread)
        for sharing in row:
            for part in sharing.parts:
                name, args = _name(part.single), _explain(picture, part.single)
                for start, end in part.computes:
                    yield _slice(process, rank, f"{name} computes", "computation", _time(start, end), args)
                for start, end in part.waits:
                    yield _slice(process, rank, f"{name} waits", "waiting", _time(start, end), args)
                thread = threads["forwards" if part.single.kind == "F" else "backwards"]
                for start, end in part.under_way:
                    yield _slice(process, thread, f"communication of {name}", "communication", _time(start, end), args)


def _list_idle(process: int, picture: Picture) -> Iterator[Event]:
    for rank, row in enumerate(picture.find_idle()):
        for gap in row:
            yield _slice(process, rank, "idle", "idle", _time(gap.start, gap.end), {"reason": gap.reason})


def _list_counters(process: int, picture: Picture) -> Iterator[Event]:
    for rank, changes in enumerate(picture.timeline.memory):
        # The last of several changes at one time is the level that lasts.
        levels = {0.0: (0.0, 0.0)} | {held.time * MICROSECONDS_PER_UNIT: (held.activations, held.queued) for held in changes}
        for time, (activations, queued) in levels.items():
            held = {"activations": activations, "queued weight gradients": queued}
            yield {"ph": "C", "name": f"memory of rank {rank}", "pid": process, "tid": rank, "ts": time, "args": held}


def _name(single: Action) -> str:
    return f"{single.kind}{single.microbatch}"


def _explain(picture: Picture, single: Action) -> dict[str, Any]:
    direction = picture.find_direction(single)
    return {"action": str(single), "stage": single.stage, "micro-batch": single.microbatch, "direction": direction}


def _time(start: float, end: float) -> dict[str, float]:
    begin = start * MICROSECONDS_PER_UNIT
    # The end less the begin, not the length scaled: where one slice ends the next begins, to the last bit.
    return {"ts": begin, "dur": end * MICROSECONDS_PER_UNIT - begin}


def _slice(process: int, rank: int, name: str, category: str, times: dict[str, float], args: dict[str, Any]) -> Event:
    return {"ph": "X", "name": name, "cat": category, "pid": process, "tid": rank, **times, "args": args}


def _describe(what: str, process: int, thread: int, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": args}
