"""Costs as a file: what a measurement of a trace or a record gives, and simulations, searches and plans take."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterflow.bounds import show, unite_pairs
from counterflow.errors import ScheduleError
from counterflow.schedule.costs import Costs, PerStage

MAX_BYTES = 2**24
# Seconds a unit.
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
NUMBERS = ("f", "i", "w", "p2p", "overlap", "reduce")
KEYS = ("unit", *NUMBERS, "source")


@dataclass(frozen=True)
class CostsFile:
    """What a costs file says: times per model chunk in ``unit`` (s, ms or us), and where they are from."""

    costs: Costs
    unit: str
    source: str
    given: frozenset[str]

    def scale(self, unit: str) -> dict[str, PerStage]:
        """Return the numbers that the file gives, times in another unit."""
        factor = UNITS[self.unit] / UNITS[unit]
        return {name: self._scale(name, factor) for name in NUMBERS if name in self.given}

    def _scale(self, name: str, factor: float) -> PerStage:
        value = getattr(self.costs, name)
        if name == "overlap" or factor == 1:
            return value  # type: ignore[no-any-return]
        return tuple(one * factor for one in value) if isinstance(value, tuple | list) else value * factor


def read_costs(path: Path) -> CostsFile:
    """Read a costs file; raises `ScheduleError` that names the file.

    It is a JSON object: ``{"unit": "ms", "f": X or [per stage], "i": …, "w": …, "p2p": …, "overlap": …, "reduce": …,
    "source": …}``. ``f``, ``i`` and ``w`` are needed, the others have the defaults of `Costs`; the unit is ms.
    """
    given = _load(path)
    if not isinstance(given, dict) or not set(given) <= set(KEYS):
        strange = ", ".join(show(key) for key in given if key not in KEYS) if isinstance(given, dict) else show(given)
        raise ScheduleError(f"{path}: {strange} given; allowed in a costs file: {', '.join(KEYS)}")
    if missing := [name for name in ("f", "i", "w") if name not in given]:
        raise ScheduleError(f"{path}: no {', '.join(missing)}; a costs file gives f, i and w per model chunk")
    unit, source = given.get("unit", "ms"), given.get("source", "")
    if not isinstance(unit, str) or unit not in UNITS:
        raise ScheduleError(f"{path}: unit {show(unit)} given; allowed: {', '.join(UNITS)}")
    if not isinstance(source, str):
        raise ScheduleError(f"{path}: source {show(source)} given; allowed: a text")
    numbers = {name: given[name] for name in NUMBERS if name in given}
    try:
        return CostsFile(Costs(**numbers), unit, source, frozenset(numbers))
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None


def _load(path: Path) -> Any:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ScheduleError(f"{path}: no file of at most {MAX_BYTES} bytes; give a costs file, as analyze --costs writes it")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unite_pairs)
    # Bytes that are no text, bad JSON, and a name that no file can have are a ValueError.
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ScheduleError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ScheduleError(f"{path}: cannot be read as a costs file: {reason}") from None
