"""A profiler trace as columns: GPU work, launches and annotations, all times in integer nanoseconds."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.schedule.timeline import Timeline

KERNEL, COPY, FILL = 0, 1, 2
NONE = -1
# Beyond, the sum of a start and a duration may not fit 64 bits.
LARGEST_TIME = 2**62

Label = str | int | float | bool | None


class Index(dict[Any, int]):
    """Numbers labels in the order in which they come."""

    def __missing__(self, label: Hashable) -> int:
        """Give a new label the next number."""
        self[label] = number = len(self)
        return number

    def number(self, labels: Iterable[Any], absent: Any = None) -> list[int]:
        """Return each label's number, -1 for those that are ``absent``."""
        return [NONE if label is absent else self[label] for label in labels]


class Table:
    """Columns of integers that grow by batches; ``columns`` maps each name to its type."""

    def __init__(self, **columns: Any) -> None:
        self._types = columns
        self._batches: dict[str, list[Array]] = {name: [] for name in columns}

    def add(self, **values: Sequence[int] | Array) -> None:
        """Append a batch: one sequence per column, all of one length."""
        for name, kind in self._types.items():
            self._batches[name].append(np.asarray(values[name], dtype=kind))

    def close(self) -> dict[str, Array]:
        """Return the columns, and let go of the batches as they are joined."""
        return {
            name: np.concatenate([np.empty(0, kind), *self._batches.pop(name)]).astype(kind, copy=False)
            for name, kind in self._types.items()
        }


@dataclass(frozen=True)
class Work:
    """What ran on GPUs, a row each: kernels, copies and fills (``what``).

    ``device``, ``stream``, ``name``, ``collective`` and ``group`` are numbers of labels. ``process`` and ``correlation`` lead to
    the launch; -1 where a trace does not say.
    """

    device: Array
    stream: Array
    what: Array
    name: Array
    start: Array
    end: Array
    process: Array
    correlation: Array
    collective: Array
    group: Array


@dataclass(frozen=True)
class Launches:
    """Calls on the host that put work on a GPU, a row each."""

    process: Array
    thread: Array
    start: Array
    correlation: Array


@dataclass(frozen=True)
class Ranges:
    """Annotations, a row each: on a thread of a process, or (``scope`` a device, ``lane`` a stream) on a GPU."""

    scope: Array
    lane: Array
    name: Array
    start: Array
    end: Array


@dataclass(frozen=True)
class Trace:
    """What one file holds; labels by number, ``left_out`` counts GPU work without usable times by device and reason.

    ``base`` is what the file's clock starts from, in nanoseconds of the host's clock. ``cut`` says why only a part was read.
    ``categories`` counts what else there is in a file without GPU work; ``timeline`` is the schedule that such a file, or a
    record, holds (in the file's milliseconds, or in seconds); ``pipeline`` is the global rank of its first rank.
    """

    path: str
    form: str
    names: tuple[str, ...]
    devices: tuple[Label, ...]
    streams: tuple[Label, ...]
    collectives: tuple[str, ...]
    groups: tuple[str, ...]
    work: Work
    launches: Launches
    ranges: Ranges
    gpu_ranges: Ranges
    left_out: Counter[tuple[Label, str]] = field(default_factory=Counter)
    events: int = 0
    rank: int | None = None
    world_size: int | None = None
    base: int = 0
    cut: str | None = None
    steps: frozenset[str] = frozenset()
    categories: Counter[str] = field(default_factory=Counter)
    timeline: Timeline | None = None
    pipeline: int | None = None


WORK_TYPES = {
    "device": np.int32, "stream": np.int32, "what": np.int8, "name": np.int32, "start": np.int64, "end": np.int64,
    "process": np.int32, "correlation": np.int64, "collective": np.int32, "group": np.int32,
}  # fmt: skip
LAUNCH_TYPES = {"process": np.int32, "thread": np.int32, "start": np.int64, "correlation": np.int64}
RANGE_TYPES = {"scope": np.int32, "lane": np.int32, "name": np.int32, "start": np.int64, "end": np.int64}
