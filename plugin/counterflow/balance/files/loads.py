"""Loads and traces from files that are not trusted."""

import csv
import json
import zipfile
from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.files.arrays import MAX_FILE_BYTES, name_file, read_array
from counterflow.balance.files.recorded import read_record
from counterflow.balance.loads import check_counts, check_loads
from counterflow.errors import BalanceError

# A list of Python objects takes some twenty times its JSON.
MAX_TEXT_BYTES = 64 * 2**20


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
        return check_counts(read_record(path).counts, str(path))
    values = _read(path, {".npz": lambda file: _read_npz(file, key), ".npy": _read_npy})
    return check_counts(values, str(path))


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


def _read_npy(path: Path) -> Array:
    with path.open("rb") as file:
        return read_array(file, str(path))


def _read_npz(path: Path, key: str | None = None) -> Array:
    with zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        wanted = [key] if key is not None else ["loads", "counts", *(keys if len(keys) == 1 else ())]
        found = next((name for name in wanted if name in keys), None)
        if found is None:
            raise BalanceError(f"{path} has no array {' or '.join(wanted)}; it has {_list_names(keys)}")
        with archive.open(f"{found}.npy") as file:
            return read_array(file, f"{path}, array {_list_names([found])}")


def _list_names(names: Iterable[str]) -> str:
    """Return names from a file on one line, at most twenty, none of them long or able to steer a terminal."""
    return ", ".join(name[:40] if name.isprintable() else ascii(name[:40]) for name in sorted(names)[:20]) or "nothing"


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
