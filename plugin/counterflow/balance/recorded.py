"""The record of a training run's expert balancing: two files per pipeline rank, which grow with every step.

``loads-rank<global rank>.npy`` holds ``int32[micro-batches, layers, experts]``, tokens per logical expert, in numpy's format 1.0;
``eplb-rank<global rank>.jsonl`` a JSON object per training step. A process that is killed while it writes leaves both readable.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from counterflow.balance.cluster import Array
from counterflow.balance.loads import name_file, read_array_header
from counterflow.errors import BalanceError

_TYPE = np.dtype("<i4")
LARGEST_RECORDED = 2**31 - 1


# ---- writing


def record_step(directory: Path, rank: int, counts: Any, step: Mapping[str, Any]) -> None:
    """Append a step of one pipeline rank to both of its files, which the first one makes.

    ``counts``: ``[micro-batches, layers, experts]`` of the step. The line says, as ``end``, how many micro-batches the loads then
    have, so that lines find their loads also where a kill left loads without a line. Raises as `append_loads` does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    end = append_loads(directory / f"loads-rank{rank:05d}.npy", counts)
    append_step(directory / f"eplb-rank{rank:05d}.jsonl", {**step, "end": end})


def append_loads(path: Path, counts: Any) -> int:
    """Append ``counts``, integers ``[micro-batches, layers, experts]``, to an array in a file; return its micro-batches then.

    Data come first, then the header's length: who is killed in between leaves the array as it was. Raises `BalanceError` where
    the file holds something else, or the counts are no integers from 0 to 2**31 - 1; `OSError` where the disk refuses.
    """
    given = _check_given(path, counts)
    if not path.exists():
        _create_loads(path, given.shape[1:])
    with path.open("r+b") as file:
        rows, start, held = _find_end(file, path)
        if held != given.shape[1:]:
            raise BalanceError(
                f"{path} holds loads of {held[0]} layers and {held[1]} experts, given are {given.shape[1]} and {given.shape[2]}; "
                "allowed: as many as it holds; record this run in a folder of its own"
            )
        file.seek(start + rows * _count_bytes(held))
        file.write(given.astype(_TYPE).tobytes())
        file.truncate()
        file.flush()
        header = _make_header((rows + len(given), *held))
        file.seek(0)
        file.write(header)
    return rows + len(given)


def append_step(path: Path, step: Mapping[str, Any]) -> None:
    """Append a line of JSON, after dropping what a kill left of an unfinished one; arrays become lists.

    Raises `ValueError` for numbers that JSON lacks, `OSError` where the disk refuses.
    """
    line = json.dumps(dict(step), separators=(",", ":"), allow_nan=False, default=lambda value: value.tolist())
    with path.open("a+b") as file:
        file.truncate(_find_last_line_end(file))
        file.write(line.encode() + b"\n")


def _check_given(path: Path, counts: Any) -> Array:
    given = np.asarray(counts)
    if given.ndim != 3 or 0 in given.shape[1:] or given.dtype.kind not in "iu":
        raise BalanceError(
            f"loads of type {given.dtype} and shape {given.shape} for {path}; "
            "allowed: integers [micro-batches, layers, experts], one layer and one expert or more"
        )
    least, most = int(given.min(initial=0)), int(given.max(initial=0))
    if least < 0 or most > LARGEST_RECORDED:
        raise BalanceError(f"loads from {least} to {most} for {path}; allowed: token counts from 0 to {LARGEST_RECORDED}")
    return given


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
