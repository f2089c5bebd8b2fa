"""Traces of the PyTorch profiler (Kineto, on CUDA and ROCm): events to columns.

``ts`` and ``dur`` are microseconds whatever ``displayTimeUnit`` says: it is for viewers. Old versions wrote ``Kernel`` for
``kernel``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.analysis.blocks import read_blocks
from counterflow.analysis.events import Arguments, Document, Event, Scalar, read_events
from counterflow.analysis.times import read_times
from counterflow.analysis.trace import (
    COPY,
    FILL,
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
from counterflow.arrays import Array
from counterflow.errors import ScheduleError
from counterflow.schedule.actions import PAIR, parse_action
from counterflow.schedule.timeline import Span, Timeline

WORK = {"kernel": KERNEL, "gpu_memcpy": COPY, "memcpy": COPY, "gpu_memset": FILL, "memset": FILL}
LAUNCHES = {"cuda_runtime", "cuda_driver", "runtime", "driver", "hip_runtime", "hip_driver"}
ACTIONS = {"F", "I", "W", "B", "pair"}
STEP = re.compile(r"ProfilerStep#(\d+)")
# Of a simulated timeline.
MAX_RANKS = 2**12
NO_ARGUMENTS = Arguments()
# Reasons to leave GPU work out.
NO_TIME, NEGATIVE = "no ts or dur", "negative dur"


class _Roles(dict[Scalar, str]):
    """What a category of events is for: work, launch, range, gpu_range or nothing."""

    def __missing__(self, category: Scalar) -> str:
        name = str(category).lower()
        role = "work" if name in WORK else "launch" if name in LAUNCHES else ""
        role = {"user_annotation": "range", "gpu_user_annotation": "gpu_range"}.get(name, role)
        role = "action" if category in ACTIONS else role
        self[category] = role
        return role


class Collector:
    """Collects the columns of one trace from batches of events."""

    def __init__(self) -> None:
        self.work, self.launches = Table(**WORK_TYPES), Table(**LAUNCH_TYPES)
        self.ranges, self.gpu_ranges = Table(**RANGE_TYPES), Table(**RANGE_TYPES)
        self.names, self.devices, self.streams, self.collectives, self.groups = (Index() for _ in range(5))
        self._places, self._ids, self._roles = Index(), Index(), _Roles()
        self.left_out: Counter[tuple[Scalar, str]] = Counter()
        self.categories: Counter[str] = Counter()
        # Of a simulation: by its picture, what `Span` takes.
        self.spans: dict[Scalar, list[tuple[Any, str, float, float]]] = {}

    def add(self, events: Iterable[Event]) -> None:
        """Take what is of use of a batch."""
        roles = self._roles
        kept: dict[str, list[Event]] = {"work": [], "launch": [], "range": [], "gpu_range": [], "action": [], "": []}
        for event in events:
            if event.ph == "X":
                kept[roles[event.cat]].append(event)
        self._add_work(kept["work"])
        self._add_launches(kept["launch"])
        self._add_ranges(self.ranges, kept["range"], on_gpu=False)
        self._add_ranges(self.gpu_ranges, kept["gpu_range"], on_gpu=True)
        self._add_actions(kept["action"])
        if not self.devices:
            self.categories.update(str(event.cat) for some in kept.values() for event in some)

    def _add_work(self, events: list[Event]) -> None:
        args = [event.args or NO_ARGUMENTS for event in events]
        start, length, timed, good = read_spans(events)
        devices = [event.pid if one.device is None else one.device for event, one in zip(events, args, strict=True)]
        if not good.all():
            for place in np.flatnonzero(~good):
                self.left_out[devices[place], NEGATIVE if timed[place] else NO_TIME] += 1
            events, args, devices = list(_choose(events, good)), list(_choose(args, good)), list(_choose(devices, good))
            start, length = start[good], length[good]
        self.work.add(
            device=[self.devices[device] for device in devices],
            stream=[
                self.streams[event.tid if one.stream is None else one.stream] for event, one in zip(events, args, strict=True)
            ],
            what=[WORK[str(event.cat).lower()] for event in events],
            name=self._name(events),
            start=start,
            end=start + length,
            process=np.full(len(events), NONE),
            correlation=self._number_ids([one.correlation for one in args]),
            collective=self.collectives.number([one.collective for one in args]),
            group=self.groups.number([_name_group(one) for one in args]),
        )

    def _add_launches(self, events: list[Event]) -> None:
        events = [event for event in events if event.args is not None and event.args.correlation is not None]
        start, _, _, good = read_spans(events)
        events = list(_choose(events, good))
        self.launches.add(
            process=[self._places[event.pid] for event in events],
            thread=[self._places[event.tid] for event in events],
            start=start[good],
            correlation=self._number_ids([event.args.correlation for event in events if event.args]),
        )

    def _add_ranges(self, table: Table, events: list[Event], on_gpu: bool) -> None:
        start, length, _, good = read_spans(events)
        events = list(_choose(events, good))
        args = [event.args or NO_ARGUMENTS for event in events]
        scopes, lanes = self.devices if on_gpu else self._places, self.streams if on_gpu else self._places
        table.add(
            scope=[scopes[e.pid if a.device is None or not on_gpu else a.device] for e, a in zip(events, args, strict=True)],
            lane=[lanes[e.tid if a.stream is None or not on_gpu else a.stream] for e, a in zip(events, args, strict=True)],
            name=self._name(events),
            start=start[good],
            end=(start + length)[good],
        )

    def _add_actions(self, events: list[Event]) -> None:
        """Keep the slices of a timeline that the project's own renderer wrote, which says the action of each."""
        events = [event for event in events if event.args is not None and isinstance(event.args.action, str)]
        start, length, _, good = read_spans(events)
        for event, begin, end in zip(events, start.tolist(), (start + length).tolist(), strict=True):
            self.spans.setdefault(event.pid, []).append(
                (event.tid, str(event.args and event.args.action), begin / 1e6, end / 1e6)
            )

    def _name(self, events: list[Event]) -> list[int]:
        names = self.names
        return [names["" if event.name is None else event.name] for event in events]

    def _number_ids(self, ids: list[Any]) -> Array | list[int]:
        """Return correlations as they are, or as numbers below -1 where they are no whole numbers from 0 up."""
        if all(type(one) is int and 0 <= one < 2**62 for one in ids):
            return ids
        return [
            NONE if one is None else int(one) if isinstance(one, int | float) and 0 <= one < 2**62 else -2 - self._ids[one]
            for one in ids
        ]


def _name_group(given: Arguments) -> Scalar:
    """Return a process group's name, which may be a number, and what its maker says that it is."""
    return given.group if given.described is None else f"{given.group} {given.described}"


def read_kineto(path: Path) -> Trace:
    """Read a trace of the PyTorch profiler; raises `TraceError` without the file's name."""
    found, document = Collector(), Document()
    for events in read_events(read_blocks(path), document):
        found.add(events)
    names = tuple(map(str, found.names))
    about = document.head.get("distributedInfo")
    about = about if isinstance(about, dict) else {}
    return Trace(
        path=str(path),
        form="kineto",
        names=names,
        devices=tuple(found.devices),
        streams=tuple(found.streams),
        collectives=tuple(map(str, found.collectives)),
        groups=tuple(map(str, found.groups)),
        work=Work(**found.work.close()),
        launches=Launches(**found.launches.close()),
        ranges=Ranges(**found.ranges.close()),
        gpu_ranges=Ranges(**found.gpu_ranges.close()),
        left_out=found.left_out,
        events=document.events,
        rank=_take_count(about.get("rank")),
        world_size=_take_count(about.get("world_size")),
        base=_take_count(document.head.get("baseTimeNanoseconds")) or 0,
        cut=document.cut,
        steps=frozenset(match[1] for name in names if (match := STEP.fullmatch(name))),
        categories=found.categories,
        timeline=_make_timeline(found.spans),
    )


def _make_timeline(pictures: dict[Scalar, list[tuple[Any, str, float, float]]]) -> Timeline | None:
    """Return the first picture's timeline; a pair's slice holds its parts', which are left out."""
    for _, rows in sorted(pictures.items(), key=lambda item: str(item[0])):
        try:
            spans = [Span(rank, parse_action(action), start, end) for rank, action, start, end in rows if type(rank) is int]
        except ScheduleError:
            continue
        parts = {(span.rank, single) for span in spans if span.action.kind == PAIR for single in span.action.parts}
        spans = [span for span in spans if 0 <= span.rank < MAX_RANKS and (span.rank, span.action) not in parts]
        return Timeline(tuple(sorted(spans, key=lambda span: (span.rank, span.start)))) if spans else None
    return None


def read_spans(events: Sequence[Event]) -> tuple[Array, Array, Array, Array]:
    """Return starts, durations, which have both as numbers, and which of these are of use; 0 where there is no number."""
    start, has_start = read_times([event.ts for event in events])
    length, has_length = read_times([event.dur for event in events])
    timed = has_start & has_length
    return start, length, timed, timed & (length >= 0)


def _choose[One](some: list[One], chosen: Array) -> Iterable[One]:
    return some if chosen.all() else (one for one, is_chosen in zip(some, chosen, strict=True) if is_chosen)


def _take_count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**62 else None
