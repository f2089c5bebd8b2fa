"""Tables as files: CSV in the compute-action notation of ``torch.distributed.pipelining``."""

import csv
import io
from pathlib import Path

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, parse_action
from counterflow.schedule.layouts import find_layout
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.validation import validate

# Far above any table's; what is none must not fill the memory.
MAX_CSV_BYTES = 256 * 2**20
MAX_CELLS = 2**24


def to_csv(table: ScheduleTable) -> str:
    """Write the table, one line per rank, in the notation of ``torch.distributed.pipelining``."""
    text = io.StringIO()
    csv.writer(text).writerows(map(str, row) for row in table.actions)
    return text.getvalue()


def from_csv(text: str, name: str = "csv", most_cells: int = MAX_CELLS) -> ScheduleTable:
    """Read a table, one line per rank, and validate it; empty cells (idle steps) and a byte order mark in front are skipped.

    Raises `ScheduleError` that names line and cell, or the layout that was found and those allowed, and for too many cells.
    """
    count = text.count(",") + text.count("\n")
    if count > most_cells:
        raise ScheduleError(f"{name}: some {count:,} cells given; allowed: {most_cells:,} at most")
    rows, columns = [], []
    for line, cells in enumerate(csv.reader(io.StringIO(text.removeprefix("\ufeff"))), start=1):
        columns.append([column for column, cell in enumerate(cells, start=1) if cell.strip()])
        rows.append(tuple(_parse_cell(cells[column - 1], f"{name}: line {line}, cell {column}") for column in columns[-1]))
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
    table = ScheduleTable(name, layout, microbatches, tuple(rows))
    try:
        validate(table)
    except ScheduleError as error:
        where = ""
        if error.place is not None:
            rank, position = error.place
            where = f"line {rank + 1}, " + (f"cell {columns[rank][position]}, " if position is not None else "")
        raise ScheduleError(f"{name}: {where}{error}", error.place) from None
    return table


def read_csv(path: Path, most_cells: int = MAX_CELLS) -> ScheduleTable:
    """Read a table from a file of at most 256 MiB; raises `ScheduleError` that names the file."""
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise ScheduleError(f"{path}: larger than {MAX_CSV_BYTES} bytes; not a schedule table")
        if not path.is_file():
            raise ScheduleError(f"{path}: no file; give the path of a schedule table in CSV")
        return from_csv(path.read_text(encoding="utf-8"), str(path), most_cells)
    except ScheduleError:
        raise
    # Bytes that are no text, and a name that no file can have, are a ValueError.
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ScheduleError(f"{path}: cannot be read as a schedule table: {reason}") from error


def _parse_cell(cell: str, where: str) -> Action:
    try:
        return parse_action(cell)
    except ScheduleError as error:
        raise ScheduleError(f"{where}: {error}") from None
