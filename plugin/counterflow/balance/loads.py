"""Check loads and traces."""

from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.errors import BalanceError

# Far above any count of tokens, and low enough that sums, squares and sums of squares stay finite.
LARGEST_LOAD = 1e100
# Smaller loads count as 0, so that shares of a load, and their squares, do not underflow.
SMALLEST_LOAD = 1e-100
LARGEST_COUNT = 2**40


def check_loads(loads: Any, name: str = "loads") -> Array:
    """Return loads as ``float64[layers, experts]``; ``[experts]`` becomes one layer.

    Loads below 1e-100 become 0. Raises `BalanceError` for any other shape, and for a load that is negative, not finite or above
    1e100.
    """
    numbers = _check_numbers(loads, name)
    values = numbers[None] if numbers.ndim == 1 else numbers
    if values.ndim != 2 or 0 in values.shape:
        raise BalanceError(f"{name} of shape {numbers.shape}; allowed: [layers, experts] or [experts], one or more of each")
    values = values.astype(np.float64)
    # Written so that a NaN, which compares as false with anything, is refused.
    _refuse_entry(values, ~((values >= 0) & (values <= LARGEST_LOAD)), ("layer", "expert"), name, f"0 to {LARGEST_LOAD:g}")
    values[values < SMALLEST_LOAD] = 0.0
    return values


def check_counts(counts: Any, name: str = "counts") -> Array:
    """Return a trace's token counts as ``int64[micro-batches, layers, experts]``.

    Raises `BalanceError` for any other shape, and for a count that is no whole number from 0 to 2**40.
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
