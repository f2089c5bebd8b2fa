"""A schedule as data: for each pipeline rank, the list of its actions."""

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, parse_action
from counterflow.schedule.layouts import Layout, find_layout

MAX_CSV_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ScheduleTable:
    """A schedule of ``microbatches`` over a layout; ``actions[rank]`` runs from left to right."""

    name: str
    layout: Layout
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Return the rank that computes a stage for a micro-batch: of two homes the first for the first half of them."""
        homes = self.layout.homes[stage]
        return homes[0] if len(homes) == 1 or microbatch < self.microbatches // 2 else homes[1]

    @cached_property
    def digest(self) -> int:
        """A 63-bit hash of the actions: equal tables have equal digests on every machine."""
        return int.from_bytes(hashlib.sha256(to_csv(self).encode()).digest()[:8], "big") >> 1

    def singles(self, rank: int) -> Iterator[Action]:
        """Yield the rank's F, I, W and B actions in order, overlapped pairs taken apart."""
        for action in self.actions[rank]:
            yield from action.singles()

    def __str__(self) -> str:
        head = f"{self.name}: {self.ranks} ranks, {self.microbatches} micro-batches, {self.layout.name} layout"
        rows = (f"  rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.actions))
        return "\n".join([head, *rows])


def to_csv(table: ScheduleTable) -> str:
    """Write the table, one line per rank, in the notation of ``torch.distributed.pipelining``."""
    text = io.StringIO()
    csv.writer(text).writerows(map(str, row) for row in table.actions)
    return text.getvalue()


def from_csv(text: str, name: str = "csv") -> ScheduleTable:
    """Read a table, one line per rank; empty cells (idle steps) are skipped.

    Raises `ScheduleError` that names line and cell, or the layout that was found and those allowed.
    """
    rows = []
    for line, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
        rows.append(tuple(_parse_cell(cell, line, column) for column, cell in enumerate(cells, 1) if cell.strip()))
    if not any(rows):
        raise ScheduleError(f"{name}: no action found; a table has one line per rank with cells like 0F0")
    stages = tuple(tuple(sorted({single.stage for action in row for single in action.singles()})) for row in rows)
    layout = find_layout(stages)
    if layout is None:
        found = "; ".join(f"rank {rank}: {list(held)}" for rank, held in enumerate(stages[:4]))
        raise ScheduleError(
            f"{name}: stages {found} are no layout of {len(rows)} ranks: straight, looped, V, zigzag or bidirectional"
        )
    microbatches = 1 + max(single.microbatch for row in rows for action in row for single in action.singles())
    return ScheduleTable(name, layout, microbatches, tuple(rows))


def read_csv(path: Path) -> ScheduleTable:
    """Read a table from a file of at most 256 MiB; raises `ScheduleError` that names the file."""
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise ScheduleError(f"{path}: larger than {MAX_CSV_BYTES} bytes; not a schedule table")
        return from_csv(path.read_text(encoding="utf-8"), name=str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"{path}: cannot be read as a schedule table: {error}") from error


def _parse_cell(cell: str, line: int, column: int) -> Action:
    try:
        return parse_action(cell)
    except ScheduleError as error:
        raise ScheduleError(f"line {line}, cell {column}: {error}") from None
