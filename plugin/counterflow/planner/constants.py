"""The constants of the time model: what ``constants.toml`` says, and the sets of them that calibrations make."""

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "constants.toml"


@dataclass(frozen=True)
class Constant:
    """One constant: what sources say, how far that may be off (one standard deviation of the logarithm), and its value."""

    name: str
    prior: float
    spread: float
    value: float
    source: str


@cache
def read_constants() -> dict[str, Constant]:
    """Return the constants by name, ``gemm.hopper.bf16``."""
    with PATH.open("rb") as file:
        return {one.name: one for one in _walk("", tomllib.load(file))}


def _walk(prefix: str, entries: Mapping[str, Any]) -> Iterator[Constant]:
    for key, entry in entries.items():
        name = f"{prefix}{key}"
        if "prior" in entry:
            yield Constant(name, entry["prior"], entry["spread"], entry.get("value", entry["prior"]), entry["source"])
        else:
            yield from _walk(f"{name}.", entry)


@dataclass(frozen=True)
class Constants:
    """A set of constants: those of the file, times ``factors`` by name. ``sigma``: how far a step's time is off (of its log)."""

    factors: tuple[tuple[str, float], ...] = ()
    priors: bool = False
    sigma: float = 0.17

    def __getitem__(self, name: str) -> float:
        constant = read_constants()[name]
        return (constant.prior if self.priors else constant.value) * self._factors.get(name, 1.0)

    @property
    def _factors(self) -> dict[str, float]:
        return _as_dict(self.factors)

    def multiply(self, factors: Mapping[str, float], sigma: float | None = None) -> "Constants":
        """Return the constants times factors by name; efficiencies stay below 1."""
        merged = dict(self.factors)
        for name, factor in factors.items():
            merged[name] = merged.get(name, 1.0) * factor
        return Constants(tuple(sorted(merged.items())), self.priors, self.sigma if sigma is None else sigma)


@cache
def _as_dict(factors: tuple[tuple[str, float], ...]) -> dict[str, float]:
    return dict(factors)


def change_logs(names: list[str], logs: Any) -> dict[str, float]:
    """Return factors by name of their logarithms."""
    return {name: math.exp(float(log)) for name, log in zip(names, logs, strict=True)}
