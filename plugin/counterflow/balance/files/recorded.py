"""The record of a training run's expert balancing: two files per pipeline rank, which grow with every step.

``loads-rank<global rank>.npy`` holds ``int32[micro-batches, layers, experts]``, tokens per logical expert, in numpy's format 1.0;
``eplb-rank<global rank>.jsonl`` a JSON object per training step. A process that is killed while it writes leaves both readable.
A line has a placement only as far as it is another than that of the line before (`describe_change`).
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import make_cluster
from counterflow.balance.files.arrays import MAX_ENTRIES, MAX_FILE_BYTES, name_file, read_array_header
from counterflow.balance.files.recorded_steps import SUMS, TIMES, RecordedStep, read_steps
from counterflow.balance.placement import Placement
from counterflow.errors import BalanceError

_TYPE = np.dtype("<i4")
LARGEST_RECORDED = 2**31 - 1
# Far above any run's.
MAX_PARTS = 4096


@dataclass(frozen=True)
class RecordedBalance:
    """What a run with ``--cf-eplb --cf-record`` wrote: S steps, L layers of all pipeline ranks, E experts, R ranks.

    ``layers``: ``int64[L]``, their numbers in the model, ascending. ``steps``: ``int64[S]``, their numbers, ascending; of a step
    that a resumed run did again the later is here. ``microbatches``: ``int64[S]``. ``before`` and ``after``: ``float64[S, L]``,
    balancedness with homes alone and with clones, the mean of the step's micro-batches; ``low`` and ``ratio``: with clones, their
    5th percentile and the mean of max/mean, of ``after`` where a record has neither. ``figures``: ``float64[S]`` by name, `SUMS`
    summed over pipeline ranks, of `TIMES` the longest.
    """

    layers: Array
    steps: Array
    microbatches: Array
    before: Array
    after: Array
    low: Array
    ratio: Array
    figures: dict[str, Array]
    experts: int
    parts: "tuple[_Part, ...]" = field(repr=False)

    @cached_property
    def counts(self) -> Array:
        """``int64[micro-batches, L, E]``: tokens per expert of all steps, read from the files.

        Raises `BalanceError` for more than `MAX_ENTRIES`; `sum_loads` has no such bound.
        """
        total, size = int(self.microbatches.sum()), len(self.layers) * self.experts
        if total * size > MAX_ENTRIES:
            raise BalanceError(
                f"record of {total:,} micro-batches, {len(self.layers)} layers and {self.experts} experts; allowed: "
                f"{MAX_ENTRIES:,} counts at once, {MAX_ENTRIES // size:,} such micro-batches: cut a part from its loads-rank*.npy"
            )
        counts = np.empty((total, len(self.layers), self.experts), np.int64)
        ends = np.cumsum(self.microbatches)
        for places, step, rows in self._read_rows():
            counts[ends[step] - len(rows) : ends[step], places] = rows
        return counts

    def sum_loads(self, starts: Array) -> Array:
        """Return ``int64[groups, L, E]``: tokens per expert of groups of steps, each from its start to the next one's."""
        sums = np.zeros((len(starts), len(self.layers), self.experts), np.int64)
        groups = self._find_groups(starts)
        for places, step, rows in self._read_rows():
            sums[groups[step], places] += rows.sum(0, dtype=np.int64)
        return sums

    def count_clones(self, starts: Array) -> Array:
        """Return ``float64[groups, L, E]``: clones that each expert had beside its home, the mean of a group's steps."""
        sums = np.zeros((len(starts), len(self.layers), self.experts))
        groups = self._find_groups(starts)
        for part in self.parts:
            places = np.searchsorted(self.layers, part.layers)
            # Empty slots are counted in a column of their own, before those of experts.
            columns = (self.experts + 1) * np.arange(len(places))[:, None] + 1
            for group, number in zip(groups, self.steps.tolist(), strict=True):
                copies = np.bincount((part.steps[number].experts + columns).ravel(), minlength=len(places) * (self.experts + 1))
                sums[group, places] += copies.reshape(len(places), -1)[:, 1:] - 1
        return sums / np.bincount(groups)[:, None, None]

    def _find_groups(self, starts: Array) -> Array:
        return np.searchsorted(starts, np.arange(len(self.steps)), side="right") - 1

    def find_placement(self, index: int) -> Placement:
        """Return the placement of the step at an index, such as -1 for the last, of all layers; homes and clones."""
        number = int(self.steps[index])
        order = np.argsort(np.concatenate([part.layers for part in self.parts]))
        held = [part.steps[number] for part in self.parts]
        experts, homes = (np.concatenate([getattr(step, name) for step in held])[order] for name in ("experts", "homes"))
        return Placement(make_cluster(held[0].ranks, experts.shape[1]), experts.astype(np.int64), homes.astype(np.int64))

    def _read_rows(self) -> Iterator[tuple[Array, int, Array]]:
        """Yield the places of a part's layers, the index of a step and its ``int32[micro-batches, layers, experts]``."""
        for part in self.parts:
            places = np.searchsorted(self.layers, part.layers)
            with name_file(part.loads), part.loads.open("rb") as file:
                for index, number in enumerate(self.steps.tolist()):
                    yield places, index, _read_loads(file, part, part.steps[number])


@dataclass(frozen=True)
class _Part:
    """What one pipeline rank wrote; ``start`` is the byte of its loads at which the first micro-batch begins."""

    loads: Path
    start: int
    layers: Array
    experts: int
    steps: dict[int, RecordedStep]


# ---- writing


def record_step(directory: Path, rank: int, counts: Any, step: Mapping[str, Any]) -> None:
    """Append a step of one pipeline rank to both of its files, which the first one makes.

    ``counts``: ``[micro-batches, layers, experts]`` of the step. The line says, as ``end``, how many micro-batches the loads then
    have, so that lines find their loads also where a kill left loads without a line. Raises as `append_loads` does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    end = append_loads(directory / f"loads-rank{rank:05d}.npy", counts)
    append_step(directory / f"eplb-rank{rank:05d}.jsonl", {**step, "end": end})


def describe_change(old: Placement | None, new: Placement) -> dict[str, Array]:
    """Return what a line says of a placement, of which the line before has ``old``; without one, all of it.

    ``changed`` are the places of the layers whose rows of ``experts`` follow; ``homes``, their rows too, only where a home moved.
    """
    assert new.homes is not None
    if old is None or old.homes is None:
        return {"experts": new.experts, "homes": new.homes}
    have_moved = (new.homes != old.homes).any(1)
    changed = np.flatnonzero((new.experts != old.experts).any(1) | have_moved)
    homes = {"homes": new.homes[changed]} if have_moved.any() else {}
    return {"changed": changed, "experts": new.experts[changed], **homes}


def append_loads(path: Path, counts: Any) -> int:
    """Append ``counts``, integers ``[micro-batches, layers, experts]``, to an array in a file; return its micro-batches then.

    Data come first, then the header's length: who is killed in between leaves the array as it was. Raises `BalanceError` where
    the file holds something else, or the counts are no integers from 0 to 2**31 - 1; `OSError` where the disk refuses.
    """
    added = _check_counts(path, counts)
    if not path.exists():
        _create_loads(path, added.shape[1:])
    with path.open("r+b") as file:
        rows, start, held = _find_end(file, path)
        if held != added.shape[1:]:
            raise BalanceError(
                f"{path} holds loads of {held[0]} layers and {held[1]} experts, given are {added.shape[1]} and {added.shape[2]}; "
                "allowed: as many as it holds; record this run in a folder of its own"
            )
        file.seek(start + rows * _count_bytes(held))
        file.write(added.astype(_TYPE).tobytes())
        file.truncate()
        file.flush()
        header = _make_header((rows + len(added), *held))
        file.seek(0)
        file.write(header)
    return rows + len(added)


def append_step(path: Path, step: Mapping[str, Any]) -> None:
    """Append a line of JSON, after dropping what a kill left of an unfinished one; arrays become lists.

    Raises `ValueError` for numbers that JSON lacks, `OSError` where the disk refuses.
    """
    line = json.dumps(dict(step), separators=(",", ":"), allow_nan=False, default=lambda value: value.tolist())
    with path.open("a+b") as file:
        file.truncate(_find_last_line_end(file))
        file.write(line.encode() + b"\n")


def _check_counts(path: Path, counts: Any) -> Array:
    added = np.asarray(counts)
    if added.ndim != 3 or 0 in added.shape[1:] or added.dtype.kind not in "iu":
        raise BalanceError(
            f"loads of type {added.dtype} and shape {added.shape} for {path}; "
            "allowed: integers [micro-batches, layers, experts], one layer and one expert or more"
        )
    least, most = int(added.min(initial=0)), int(added.max(initial=0))
    if least < 0 or most > LARGEST_RECORDED:
        raise BalanceError(f"loads from {least} to {most} for {path}; allowed: token counts from 0 to {LARGEST_RECORDED}")
    return added


def _create_loads(path: Path, held: tuple[int, ...]) -> None:
    """Make a file of no micro-batches, at once whole."""
    made = path.with_suffix(".new")
    made.write_bytes(_make_header((0, *held)))
    made.replace(path)


def _make_header(shape: tuple[int, ...]) -> bytes:
    """Numpy pads it for the first axis to grow: the same length for any number of micro-batches."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": _TYPE.str, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _find_end(file: IO[bytes], path: Path) -> tuple[int, int, tuple[int, int]]:
    """Return micro-batches that are there whole, where the first begins, and layers and experts; of a file that this wrote."""
    with name_file(path):
        shape, by_column, dtype = read_array_header(file, str(path))
    if len(shape) != 3 or min(shape) < 0 or 0 in shape[1:] or by_column or dtype != _TYPE:
        raise BalanceError(
            f"{path} is of type {dtype} and shape {shape}; "
            f"allowed: loads of a recorded run, {_TYPE} [micro-batches, layers, experts], row by row"
        )
    start, held = file.tell(), (shape[1], shape[2])
    # A disk that lost power may hold the header without its last rows.
    rows = min(shape[0], (file.seek(0, io.SEEK_END) - start) // _count_bytes(held))
    return rows, start, held


def _count_bytes(held: tuple[int, int]) -> int:
    """Return the bytes of a micro-batch of so many layers and experts."""
    return held[0] * held[1] * _TYPE.itemsize


def _find_last_line_end(file: IO[bytes]) -> int:
    """Return where the last finished line ends: nearly always the end of the file."""
    block = 2**16
    end = file.seek(0, io.SEEK_END)
    while end:
        begin = max(0, end - block)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


# ---- reading


def read_record(directory: Path) -> RecordedBalance:
    """Read what all pipeline ranks wrote, of the steps that each of them has whole.

    What a kill left unfinished is passed over; anything else that does not fit raises `BalanceError` that names file and line.
    """
    with name_file(directory):
        paths = _list_steps(directory)
    parts = tuple(_read_part(path) for path in paths)
    _check_parts(directory, parts)
    numbers = sorted(set.intersection(*(set(part.steps) for part in parts)))
    if not numbers:
        raise BalanceError(f"{directory} has no step that all {len(parts)} pipeline ranks finished; allowed: 1 or more")
    return _merge(directory, parts, numbers)


def _merge(directory: Path, parts: tuple[_Part, ...], numbers: list[int]) -> RecordedBalance:
    rows = [[part.steps[number] for part in parts] for number in numbers]
    for row in rows:
        sizes = {(step.ranks, step.experts.shape[1], step.microbatches) for step in row}
        if len(sizes) > 1:
            raise BalanceError(
                f"{directory}: step {row[0].number} has ranks, slots and micro-batches {sorted(sizes)}; "
                "allowed: the same in all files; record each run in a folder of its own"
            )
    layers = np.concatenate([part.layers for part in parts])
    order = np.argsort(layers)

    def join(take: Callable[[RecordedStep], Array]) -> Array:
        return np.stack([np.concatenate([take(step) for step in row])[order] for row in rows])

    def combine(name: str, how: Callable[[list[float]], float]) -> Array:
        return np.array([how([step.figures[name] for step in row]) for row in rows], np.float64)

    return RecordedBalance(
        layers=layers[order],
        steps=np.array(numbers),
        microbatches=np.array([row[0].microbatches for row in rows]),
        before=join(lambda step: step.before),
        after=join(lambda step: step.after),
        low=join(lambda step: step.low),
        ratio=join(lambda step: step.ratio),
        figures={name: combine(name, math.fsum) for name in SUMS} | {name: combine(name, max) for name in TIMES},
        experts=parts[0].experts,
        parts=parts,
    )


def _list_steps(directory: Path) -> list[Path]:
    paths = sorted(path for path in directory.glob("eplb-rank*.jsonl") if re.fullmatch(r"eplb-rank[0-9]+\.jsonl", path.name))
    if not 1 <= len(paths) <= MAX_PARTS:
        raise BalanceError(
            f"{directory} has {len(paths)} files eplb-rank*.jsonl; "
            f"allowed: 1 to {MAX_PARTS}, as a run with --cf-eplb --cf-record DIR writes them"
        )
    for path in paths:
        if not path.is_file() or not _find_loads(path).is_file():
            missing = _find_loads(path) if path.is_file() else path
            raise BalanceError(f"{missing} is no file; allowed: a pair of files for each pipeline rank, loads and steps")
    total = sum(path.stat().st_size for path in paths)
    if total > MAX_FILE_BYTES:
        raise BalanceError(
            f"{directory} has {total} bytes in its eplb-rank*.jsonl; "
            f"allowed: {MAX_FILE_BYTES}; record a long run in several folders"
        )
    return paths


def _check_parts(directory: Path, parts: tuple[_Part, ...]) -> None:
    experts = {part.experts for part in parts}
    if len(experts) > 1:
        raise BalanceError(f"{directory} has loads of {sorted(experts)} experts; allowed: as many in all files")
    layers, times = np.unique(np.concatenate([part.layers for part in parts]), return_counts=True)
    if (times > 1).any():
        raise BalanceError(
            f"{directory} has layer {layers[times > 1][0]} twice; "
            "allowed: each layer once; record each run, and each number of pipeline ranks, in a folder of its own"
        )


def _find_loads(path: Path) -> Path:
    return path.with_name(path.name.replace("eplb-", "loads-", 1)).with_suffix(".npy")


def _read_part(path: Path) -> _Part:
    loads = _find_loads(path)
    with name_file(loads), loads.open("rb") as file:
        rows, start, (layers, experts) = _find_end(file, loads)
    numbers, steps = read_steps(path, layers, experts)
    return _Part(loads, start, np.array(numbers, np.int64), experts, {step.number: step for step in steps if step.end <= rows})


def _read_loads(file: IO[bytes], part: _Part, step: RecordedStep) -> Array:
    shape = (step.microbatches, len(part.layers), part.experts)
    size = math.prod(shape) * _TYPE.itemsize
    file.seek(part.start + (step.end - step.microbatches) * size // step.microbatches)
    data = file.read(size)
    if len(data) < size:
        raise BalanceError(f"{part.loads} was cut while it was read; allowed: a record that only grows")
    rows = np.frombuffer(data, _TYPE).reshape(shape)
    if rows.min() < 0:
        raise BalanceError(f"{part.loads} has {rows.min()} tokens in step {step.number}; allowed: 0 to {LARGEST_RECORDED}")
    return rows
