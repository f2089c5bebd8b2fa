"""Numbers that are given: whole or not, from where to where. The one place that says what is allowed instead."""

import math
import operator
from typing import Any

from counterflow.errors import CounterflowError, OptionError

MAX_SHOWN = 60


def take_whole(
    given: Any, name: str, least: int = 0, most: int | None = None, error: type[CounterflowError] = OptionError
) -> int:
    """Return a whole number within bounds, numpy's too; raises ``error`` that names it for anything else."""
    try:
        number = operator.index(given)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise error(f"{name} {show(given)} given; allowed: {describe('a whole number', least, most)}".lstrip())
    return number


def take_number(
    given: Any, name: str, least: float = 0.0, most: float | None = None, error: type[CounterflowError] = OptionError
) -> float:
    """Return a finite number within bounds; raises ``error`` that names it for anything else, text included."""
    try:
        number = math.nan if isinstance(given, str | bytes) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least or (most is not None and number > most):
        raise error(f"{name} {show(given)} given; allowed: {describe('a finite number', least, most)}".lstrip())
    return number


def describe(kind: str, least: float, most: float | None) -> str:
    """Return bounds in words."""
    words = [f"{bound}" if isinstance(bound, int) else f"{bound:g}" for bound in (least, most) if bound is not None]
    return f"{kind} from {' to '.join(words)}" + (" up" if most is None else "")


def show(given: Any) -> str:
    """Return what was given on one line, shortened."""
    try:
        text = given if isinstance(given, str) else repr(given)
    except ValueError:  # a whole number with more digits than Python writes
        text = f"<a number of {given.bit_length()} bits>"
    text = text if text and text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
