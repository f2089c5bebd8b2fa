"""Arrays of numbers in numpy's format, read from files that are not trusted: no pickle, bounded memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from counterflow.arrays import Array
from counterflow.errors import BalanceError

MAX_FILE_BYTES = 2 * 2**30
# As float64 or int64, whatever the file's own type.
MAX_ENTRIES = MAX_FILE_BYTES // 8


@contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Turn whatever reading a file raises into a `BalanceError` of one line that names the file."""
    try:
        yield
    except BalanceError:
        raise
    # zip, its compressors, numpy's header and JSON each have errors of their own for bytes that are not theirs.
    except Exception as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(words.split())[:200] or type(error).__name__
        raise BalanceError(f"{path}: cannot be read as {path.suffix.lower()}: {reason}") from error


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


def read_array(file: IO[bytes], name: str) -> Array:
    """Read an array in numpy's format without ever allocating more than its header was allowed to ask for."""
    shape, by_column, dtype = read_array_header(file, name)
    if min(shape, default=0) < 0 or math.prod(shape) > MAX_ENTRIES:
        raise BalanceError(f"{name} of shape {shape}; allowed: {MAX_ENTRIES} numbers, {MAX_FILE_BYTES} bytes")
    asked = math.prod(shape) * dtype.itemsize
    data = file.read(asked)
    if len(data) < asked:
        raise BalanceError(f"{name} is truncated: {len(data)} of {asked} bytes are there")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C")
