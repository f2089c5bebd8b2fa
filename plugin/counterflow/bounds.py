"""Check numbers from users against bounds, with one form of error message for all of them."""

import math
import operator
from collections.abc import Iterable
from typing import Any

from counterflow.errors import CounterflowError, OptionError

MAX_SHOWN = 60


def take_whole(
    value: Any, name: str, least: int = 0, most: int | None = None, error: type[CounterflowError] = OptionError
) -> int:
    """Return ``value`` as an int if it is a whole number within bounds, numpy's included; else raise ``error`` with ``name``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise error(f"{name} {show(value)} given; allowed: {describe('a whole number', least, most)}".lstrip())
    return number


def take_number(
    value: Any, name: str, least: float = 0.0, most: float | None = None, error: type[CounterflowError] = OptionError
) -> float:
    """Return ``value`` as a float if it is a finite number within bounds, and no text; else raise ``error`` with ``name``."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least or (most is not None and number > most):
        raise error(f"{name} {show(value)} given; allowed: {describe('a finite number', least, most)}".lstrip())
    return number


class RepeatedKeyError(ValueError):
    """A mapping in a file has a key twice."""


def unite_pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return keys and values as a mapping, as JSON's ``object_pairs_hook``; raises `RepeatedKeyError` for a key given twice."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(f"key {show(key)} is given twice: drop one")
        found[key] = value
    return found


def describe(kind: str, least: float, most: float | None) -> str:
    """Return bounds in words."""
    words = [f"{bound}" if isinstance(bound, int) else f"{bound:g}" for bound in (least, most) if bound is not None]
    return f"{kind} from {' to '.join(words)}" + (" up" if most is None else "")


def show(value: Any) -> str:
    """Return a value on one line, shortened, for error messages."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        text = f"<a number of {value.bit_length()} bits>"
    text = text if text and text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
