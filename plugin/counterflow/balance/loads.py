"""Loads and traces: what is allowed in them, and reading them from files that are not trusted."""

import csv
import json
import math
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from counterflow.balance.cluster import Array
from counterflow.errors import BalanceError

# Far above any count of tokens, and low enough that sums, squares and sums of squares stay finite.
LARGEST_LOAD = 1e100
# Less is taken as 0, so that shares of a load, and their squares, do not vanish.
SMALLEST_LOAD = 1e-100
LARGEST_COUNT = 2**40
MAX_FILE_BYTES = 2 * 2**30
# As float64 or int64, whatever the file's own type.
MAX_ENTRIES = MAX_FILE_BYTES // 8
# A list of Python objects takes some twenty times its JSON.
MAX_TEXT_BYTES = 64 * 2**20


def check_loads(loads: Any, name: str = "loads") -> Array:
    """Return loads as ``float64[layers, experts]``; ``[experts]`` becomes one layer.

    Loads below 1e-100 become 0. Raises `BalanceError` where the shape is another, or a load is negative, not finite or
    above 1e100.
    """
    given = _check_numbers(loads, name)
    values = given[None] if given.ndim == 1 else given
    if values.ndim != 2 or 0 in values.shape:
        raise BalanceError(f"{name} of shape {given.shape}; allowed: [layers, experts] or [experts], one or more of each")
    values = values.astype(np.float64)
    # Written so that a NaN, which compares as false with anything, is refused.
    _refuse_entry(values, ~((values >= 0) & (values <= LARGEST_LOAD)), ("layer", "expert"), name, f"0 to {LARGEST_LOAD:g}")
    values[values < SMALLEST_LOAD] = 0.0
    return values


def check_counts(counts: Any, name: str = "counts") -> Array:
    """Return a trace's token counts as ``int64[micro-batches, layers, experts]``.

    Raises `BalanceError` where the shape is another, or a count is no whole number from 0 to 2**40.
    """
    values = _check_numbers(counts, name)
    if values.ndim != 3 or 0 in values.shape:
        raise BalanceError(f"{name} of shape {values.shape}; allowed: [micro-batches, layers, experts], one or more of each")
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
    fits = (values >= 0) & (values <= LARGEST_COUNT) & (values == np.floor(values))
    axes = ("micro-batch", "layer", "expert")
    _refuse_entry(values, ~fits, axes, name, f"whole numbers from 0 to {LARGEST_COUNT}")
    return values.astype(np.int64)


def read_loads(path: Path) -> Array:
    """Read ``float64[layers, experts]`` from .npy, .npz, .csv or .json; a trace, ``[micro-batches, layers, experts]``, is summed.

    An .npz is asked for ``loads``, then ``counts``, then its only array; a JSON object for ``loads``, then ``counts``.
    Raises `BalanceError` that names the file.
    """
    readers: dict[str, Callable[[Path], Array]] = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".json": _read_json}
    values = _read(path, readers)
    if values.ndim == 3:
        return check_loads(check_counts(values, str(path)).sum(0), str(path))
    return check_loads(values, str(path))


def read_trace(path: Path, key: str = "counts") -> Array:
    """Read ``int64[micro-batches, layers, experts]`` from an .npz, under ``key``, an .npy, or the folder of a recorded run.

    Raises `BalanceError` that names the file.
    """
    if path.is_dir():
        from counterflow.balance.recorded import read_record  # which reads arrays as this module does

        return check_counts(read_record(path).counts, str(path))
    values = _read(path, {".npz": lambda file: _read_npz(file, key), ".npy": _read_npy})
    return check_counts(values, str(path))


def _check_numbers(values: Any, name: str) -> Array:
    try:
        numbers = np.asarray(values)
    except ValueError:
        raise BalanceError(f"{name}: rows of unequal length; allowed: as many experts in every layer") from None
    if numbers.dtype.kind not in "iuf":
        raise BalanceError(f"{name} of type {numbers.dtype}; allowed: integers or floats")
    return numbers


def _refuse_entry(values: Array, wrong: Array, axes: tuple[str, ...], name: str, allowed: str) -> None:
    if wrong.any():
        first = np.unravel_index(int(wrong.argmax()), wrong.shape)
        where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, first, strict=True))
        raise BalanceError(f"{name}: {values[first]} at {where}; allowed: {allowed}")


def _read(path: Path, readers: dict[str, Callable[[Path], Array]]) -> Array:
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".pkl", ".pickle"):
        raise BalanceError(f"{path} is a pickle, which runs code when it is read; save its counts with numpy.savez and give that")
    if suffix not in readers:
        raise BalanceError(f"{path}: {suffix or 'no suffix'} is not known; allowed: {', '.join(readers)}")
    with name_file(path):
        if not path.is_file():
            raise BalanceError(f"{path} is no file" if path.exists() else f"{path}: there is no such file")
        limit = MAX_TEXT_BYTES if suffix in (".csv", ".json") else MAX_FILE_BYTES
        if path.stat().st_size > limit:
            raise BalanceError(f"{path} has {path.stat().st_size} bytes; allowed: {limit} in {suffix}")
        return readers[suffix](path)


@contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into a `BalanceError` of one line that names the file."""
    try:
        yield
    except BalanceError:
        raise
    # zip, its compressors, numpy's header and JSON each have errors of their own for bytes that are not theirs.
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(said.split())[:200] or type(error).__name__
        raise BalanceError(f"{path}: cannot be read as {path.suffix.lower()}: {reason}") from error


def _read_npy(path: Path) -> Array:
    with path.open("rb") as file:
        return _read_array(file, str(path))


def _read_npz(path: Path, key: str | None = None) -> Array:
    with zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        wanted = [key] if key is not None else ["loads", "counts", *(keys if len(keys) == 1 else ())]
        found = next((name for name in wanted if name in keys), None)
        if found is None:
            raise BalanceError(f"{path} has no array {' or '.join(wanted)}; it has {_list_names(keys)}")
        with archive.open(f"{found}.npy") as file:
            return _read_array(file, f"{path}, array {_list_names([found])}")


def _list_names(names: Iterable[str]) -> str:
    """Return names from a file on one line, at most twenty, none of them long or able to steer a terminal."""
    return ", ".join(name[:40] if name.isprintable() else ascii(name[:40]) for name in sorted(names)[:20]) or "nothing"


def read_array_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it lies column by column, and type of an array of numbers in numpy's format; no data is read."""
    version = np.lib.format.read_magic(file)
    # Later versions have headers of up to 4 GiB and are written for structured types alone.
    if version != (1, 0):
        raise BalanceError(f"{name} is in numpy's format {version}; allowed: (1, 0), which numbers are written in")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise BalanceError(f"{name} holds Python objects, a pickle, which runs code when it is read; save numbers")
    if dtype.kind not in "iuf":
        raise BalanceError(f"{name} of type {dtype}; allowed: integers or floats")
    return shape, by_column, dtype


def _read_array(file: IO[bytes], name: str) -> Array:
    """Read an array in numpy's format without ever allocating more than its header was allowed to ask for."""
    shape, by_column, dtype = read_array_header(file, name)
    if min(shape, default=0) < 0 or math.prod(shape) > MAX_ENTRIES:
        raise BalanceError(f"{name} of shape {shape}; allowed: {MAX_ENTRIES} numbers, {MAX_FILE_BYTES} bytes")
    asked = math.prod(shape) * dtype.itemsize
    data = file.read(asked)
    if len(data) < asked:
        raise BalanceError(f"{name} is truncated: {len(data)} of {asked} bytes are there")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C")


def _read_csv(path: Path) -> Array:
    numbers, width = array("d"), 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line, cells in enumerate(csv.reader(file), start=1):
            if not cells or (line == 1 and all(_is_name(cell) for cell in cells)):
                continue
            width = width or len(cells)
            if len(cells) != width:
                raise BalanceError(f"{path}: line {line} has {len(cells)} cells; the first layer has {width}")
            for column, cell in enumerate(cells, start=1):
                numbers.append(_parse_cell(cell, f"{path}: line {line}, cell {column}"))
    return np.frombuffer(numbers).reshape(-1, max(1, width))


def _is_name(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return bool(cell.strip())
    return False


def _parse_cell(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise BalanceError(
            f"{where}: {cell[:40]!r} is no number; allowed: one row of numbers per layer, names in line 1"
        ) from None


def _read_json(path: Path) -> Array:
    values = json.loads(path.read_bytes())
    if isinstance(values, dict):
        found = next((key for key in ("loads", "counts") if key in values), None)
        if found is None:
            raise BalanceError(f"{path} has no key loads or counts; it has {_list_names(values)}")
        values = values[found]
    # By hand: numpy would take text for numbers, or make room for the longest text in every entry.
    shape, level = [], [values]
    while level and isinstance(level[0], list):
        widths = {len(item) if isinstance(item, list) else -1 for item in level}
        if len(widths) > 1:
            raise BalanceError(f"{path}: rows of unequal length; allowed: as many experts in every layer")
        shape.append(widths.pop())
        level = list(chain.from_iterable(level))
    for item in level:
        if type(item) not in (int, float):
            raise BalanceError(f"{path}: {str(item)[:40]!r} is no number; allowed: a list per layer of a number per expert")
    return np.array(level, np.float64).reshape(shape)
