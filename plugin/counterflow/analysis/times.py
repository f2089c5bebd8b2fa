"""Microseconds, as written in a trace, to integer nanoseconds."""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from counterflow.analysis.trace import LARGEST_TIME
from counterflow.arrays import Array

# Of a number in nanoseconds, that 64 bits hold it: 19 digits, if the first is below 4.
MOST_DIGITS, LEAST_TOO_LARGE = 19, ord("4")


def read_times(texts: Sequence[Any]) -> tuple[Array, Array]:
    """Return nanoseconds int64[n] of microseconds that are written as decimals (bytes), and which are numbers, bool[n].

    What is no finite number, or beyond 2^62 ns, is 0. More than three decimals are rounded, halves to even.
    """
    if not len(texts):
        return np.empty(0, np.int64), np.empty(0, bool)
    text = b"\n".join([*texts, b""])
    if text.count(b"\n") != len(texts):
        text = b"".join(bytes(one).replace(b"\n", b" ") + b"\n" for one in texts)
    if text.translate(None, b"0123456789.\n") or b"\n\n" in text or text.startswith(b"\n"):
        return _read_any(text)
    # Where numbers and their points end; the digits before an end then make one whole number.
    characters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    lengths = np.diff(ends, prepend=-1) - 1
    points = np.flatnonzero(characters == ord("."))
    owner = np.searchsorted(ends, points)
    decimals = np.zeros(len(ends), np.int64)
    decimals[owner] = ends[owner] - points - 1
    has_one = len(np.unique(owner)) == len(owner) and bool((lengths > (decimals > 0)).all())
    digits_needed = lengths - (decimals > 0) + np.maximum(0, 3 - decimals)
    first = characters[ends - lengths][digits_needed == MOST_DIGITS]
    if not has_one or digits_needed.max() > MOST_DIGITS or (first >= LEAST_TOO_LARGE).any() or not _are_digits(points, ends):
        return _read_any(text)
    digits = np.fromstring(text.replace(b".", b""), np.int64, sep="\n")
    digits *= 10 ** np.maximum(0, 3 - decimals)
    step = 10 ** np.maximum(0, decimals - 3)
    whole, rest = np.divmod(digits, step)
    whole += (2 * rest > step) | ((2 * rest == step) & (whole % 2 == 1))
    return whole, np.ones(len(whole), bool)


def _are_digits(points: Array, ends: Array) -> bool:
    """Tell whether a digit stands on both sides of each point."""
    edges = np.concatenate([ends, [-1]])
    return not (np.isin(points + 1, edges).any() or np.isin(points - 1, edges).any())


def _read_any(text: bytes) -> tuple[Array, Array]:
    found = [_read_one(one) for one in text[:-1].split(b"\n")]
    return np.array([one or 0 for one in found], np.int64), np.array([one is not None for one in found], bool)


def _read_one(text: bytes) -> int | None:
    try:
        value = Decimal(text.strip(b'" ').decode())
        nanoseconds = int((value * 1000).to_integral_value()) if abs(value) < LARGEST_TIME else None
    except (InvalidOperation, ValueError):
        return None
    return nanoseconds if nanoseconds is not None and abs(nanoseconds) < LARGEST_TIME else None
