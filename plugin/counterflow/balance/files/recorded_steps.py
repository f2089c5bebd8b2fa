"""The lines of a recorded run, one JSON object per training step: read from files that are not trusted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import make_cluster
from counterflow.balance.files.arrays import name_file
from counterflow.balance.placement import EMPTY, Placement
from counterflow.errors import BalanceError

# Of a step, summed over pipeline ranks, and the largest of them.
SUMS = (
    "clones", "moved", "lent", "homes_moved", "bytes", "lent_bytes", "home_bytes", "tokens_homes", "tokens_resident",
    "tokens_just_in_time",
)  # fmt: skip
TIMES = ("weights_ms", "gradients_ms", "waited_ms", "homes_ms", "forced_ms", "routed_ms")
# Those that records of earlier versions lack, or lines of steps in which nothing was measured.
ADDED = (
    "lent", "lent_bytes", "home_bytes", "tokens_homes", "tokens_resident", "tokens_just_in_time", "homes_ms", "forced_ms",
    "routed_ms",
)  # fmt: skip
# Far above any run's; what is read must not fill the memory.
MAX_LINE_BYTES = 16 * 2**20
MAX_WHOLE = 2**53


@dataclass(frozen=True)
class RecordedStep:
    """A line: its micro-batches end at ``end`` in the loads; ``experts`` and ``homes`` are integers
    ``[layers, slots]`` and ``[layers, experts]``, as of a `Placement`."""

    number: int
    ranks: int
    microbatches: int
    end: int
    before: Array
    after: Array
    low: Array
    ratio: Array
    experts: Array
    homes: Array
    figures: dict[str, float]


def read_steps(path: Path, layers: int, experts: int) -> tuple[list[int], list[RecordedStep]]:
    """Return the layers' numbers in the model, and the steps of one pipeline rank, ascending.

    A last line without an end, which a kill leaves, is passed over. Of what a resumed run did again, the later is kept. Raises
    `BalanceError` that names file and line for anything that does not fit so many layers and experts.
    """
    kept: list[RecordedStep] = []
    numbers: list[int] | None = None
    step: RecordedStep | None = None
    for line, where in _read_lines(path):
        numbers = _take_layers(line, where, layers, numbers)
        # Placements follow from the line before, which may be one that does not count.
        step = _parse_step(line, where, layers, experts, step, kept[-1].end if kept else 0)
        # A resumed run goes back to its checkpoint: what it did after that is no part of how it came here.
        while kept and (kept[-1].number >= step.number or kept[-1].end > step.end - step.microbatches):
            kept.pop()
        kept.append(step)
    return numbers or [], kept


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each finished line and where it is."""
    with name_file(path), path.open("rb") as file:
        number = 0
        while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            number += 1
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BalanceError(f"{where} is no JSON: {str(error)[:80]}; allowed: one object per step") from None
            if not isinstance(entry, dict):
                raise BalanceError(f"{where} is {_quote(entry)}; allowed: one object per step")
            yield entry, where
        if len(line) == MAX_LINE_BYTES:
            raise BalanceError(f"{path}, line {number + 1} is longer than {MAX_LINE_BYTES} bytes; allowed: one object per step")


def _parse_step(
    entry: dict[str, Any], where: str, layers: int, experts: int, last: RecordedStep | None, end: int
) -> RecordedStep:
    ranks = _take_whole(entry, "ranks", where, 1)
    microbatches = _take_whole(entry, "microbatches", where, 1)
    follows = {"end": end + microbatches}
    held, homes = _take_placement(entry, where, layers, experts, last)
    if homes.shape[1] != experts:
        raise BalanceError(f"{where}: homes of {homes.shape[1]} experts; allowed: {experts}, as its loads have")
    try:
        Placement(make_cluster(ranks, held.shape[1]), held, homes)
    except BalanceError as error:
        raise BalanceError(f"{where}: {error}") from None
    if last is not None and np.array_equal(held, last.experts) and np.array_equal(homes, last.homes):
        held, homes = last.experts, last.homes  # most steps of a long run share theirs
    after = _take_shares(entry, "balancedness_after", where, layers)
    # Records of earlier versions lack some figures.
    entry = dict.fromkeys(ADDED, 0) | entry
    return RecordedStep(
        number=_take_whole(entry, "step", where, 0),
        ranks=ranks,
        microbatches=microbatches,
        end=_take_whole(follows | entry, "end", where, microbatches),
        before=_take_shares(entry, "balancedness_before", where, layers),
        after=after,
        low=_take_shares(entry, "balancedness_p5", where, layers) if "balancedness_p5" in entry else after,
        ratio=_take_ratios(entry, where, layers) if "max_over_mean" in entry else 1 / np.maximum(after, 1 / ranks),
        experts=held,
        homes=homes,
        figures={name: _take_whole(entry, name, where, 0) for name in SUMS}
        | {name: _take_number(entry, name, where) for name in TIMES},
    )


def _take_placement(
    entry: dict[str, Any], where: str, layers: int, experts: int, last: RecordedStep | None
) -> tuple[Array, Array]:
    """Return ``experts`` and ``homes`` of a line, of which it may have only the rows that are others than the line before has."""
    if "changed" not in entry:
        held = _take_table(entry, "experts", where, layers, (EMPTY, experts - 1))
        return held, _take_table(entry, "homes", where, layers, (0, held.shape[1] - 1))
    if last is None:
        raise BalanceError(
            f"{where} has what has changed of a placement, and no line before it; allowed: a whole placement first"
        )

    def fits(value: Any) -> bool:
        whole = isinstance(value, list) and all(type(each) is int and 0 <= each < layers for each in value)
        return whole and value == sorted(set(value))

    changed = _take(entry, "changed", where, fits, f"places of layers, from 0 to {layers - 1}, ascending")
    held, homes = last.experts, last.homes
    if changed:
        held = held.copy()
        held[changed] = _take_rows(entry, "experts", where, (len(changed), held.shape[1]), (EMPTY, experts - 1))
    if changed and "homes" in entry:
        homes = homes.copy()
        homes[changed] = _take_rows(entry, "homes", where, (len(changed), experts), (0, held.shape[1] - 1))
    return held, homes


def _take_rows(entry: dict[str, Any], key: str, where: str, shape: tuple[int, int], bounds: tuple[int, int]) -> Array:
    rows = _take_table(entry, key, where, shape[0], bounds)
    if rows.shape != shape:
        raise BalanceError(f"{where}: {key} has rows of {rows.shape[1]}; allowed: {shape[1]}, as in the lines before")
    return rows


def _take(entry: dict[str, Any], key: str, where: str, fits: Callable[[Any], bool], allowed: str) -> Any:
    if key not in entry:
        raise BalanceError(f"{where} has no {key}; allowed: {allowed}")
    if not fits(entry[key]):
        raise BalanceError(f"{where}: {key} is {_quote(entry[key])}; allowed: {allowed}")
    return entry[key]


def _take_whole(entry: dict[str, Any], key: str, where: str, least: int) -> int:
    allowed = f"a whole number from {least} to {MAX_WHOLE}"
    return int(_take(entry, key, where, lambda value: type(value) is int and least <= value <= MAX_WHOLE, allowed))


def _take_number(entry: dict[str, Any], key: str, where: str) -> float:
    allowed = f"a number from 0 to {MAX_WHOLE}"
    return float(_take(entry, key, where, lambda value: type(value) in (int, float) and 0 <= value <= MAX_WHOLE, allowed))


def _take_shares(entry: dict[str, Any], key: str, where: str, layers: int) -> Array:
    def fits(value: Any) -> bool:
        # A rounding error above 1 is none of the reader's.
        return _is_list(value, layers) and all(type(each) in (int, float) and 0 <= each <= 1 + 1e-6 for each in value)

    taken = _take(entry, key, where, fits, f"{layers} numbers from 0 to 1, one per layer of its loads")
    return np.minimum(np.array(taken, np.float64), 1.0)


def _take_ratios(entry: dict[str, Any], where: str, layers: int) -> Array:
    def fits(value: Any) -> bool:
        return _is_list(value, layers) and all(type(each) in (int, float) and 1 - 1e-5 <= each <= MAX_WHOLE for each in value)

    taken = _take(entry, "max_over_mean", where, fits, f"{layers} numbers from 1, one per layer of its loads")
    return np.maximum(np.array(taken, np.float64), 1.0)


def _take_layers(entry: dict[str, Any], where: str, layers: int, before: list[int] | None) -> list[int]:
    def fits(value: Any) -> bool:
        whole = _is_list(value, layers) and all(type(each) is int and 0 <= each <= MAX_WHOLE for each in value)
        return whole and len(set(value)) == layers and before in (None, value)

    allowed = (
        f"{layers} whole numbers, as its loads have layers" if before is None else f"{_quote(before)}, as in the lines before"
    )
    return list(_take(entry, "layers", where, fits, allowed))


def _take_table(entry: dict[str, Any], key: str, where: str, layers: int, bounds: tuple[int, int]) -> Array:
    """Return integers ``[layers, columns]``. By hand: numpy would make room for the longest text in every entry."""

    def fits(value: Any) -> bool:
        rows = _is_list(value, layers) and all(_is_list(row, len(value[0]) if _is_list(value[0]) else 0) for row in value)
        return rows and all(type(each) is int and bounds[0] <= each <= bounds[1] for row in value for each in row)

    allowed = f"{layers} rows, one per layer, all as long, of whole numbers from {bounds[0]} to {bounds[1]}"
    # Of a long run there are many.
    return np.array(_take(entry, key, where, fits, allowed), np.int16 if bounds[1] < 2**15 else np.int32)


def _is_list(value: Any, size: int | None = None) -> bool:
    return isinstance(value, list) and len(value) > 0 and size in (None, len(value))


def _quote(value: Any) -> str:
    """Return a value of a file on one line, short, without what could steer a terminal."""
    text = ascii(value)
    return text if len(text) <= 40 else text[:39] + "…"
