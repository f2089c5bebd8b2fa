"""The stamp of a checkpoint: the model's layout with its chunks per rank (``v 2``), and a digest if the table is from a file.

Where a trainer saves no arguments with its checkpoints, a file has the stamp (`write_cut`).

The name of a schedule determines its layout. The name of a file does not: when the checkpoint is read, the file may have another
table or be gone.
"""

import json
from pathlib import Path
from typing import NamedTuple

from counterflow.errors import CounterflowError
from counterflow.options import Options
from counterflow.schedule.layouts import LOOPED, STRAIGHT
from counterflow.trainer.tables import choose_layout, name_model_layout

# The layout without a schedule, and the file in a checkpoint that has its cut.
PLAIN = f"{STRAIGHT} 1"
FILE = "counterflow.json"


class Cut(NamedTuple):
    """How a model is dealt to pipeline ranks: its layout with the chunks per rank, and the first layer of each stage."""

    layout: str
    ranks: int
    parts: list[int]

    def __str__(self) -> str:
        name, chunks = self.layout.split()
        many = "s" if chunks != "1" else ""
        return f"{name} layout with {chunks} chunk{many} per rank on {self.ranks} ranks (parts {self.parts})"


def write_cut(folder: Path, cut: Cut) -> None:
    """Write the cut beside a checkpoint's files in ``folder``."""
    (folder / FILE).write_text(json.dumps(cut._asdict()) + "\n")


def read_cut(folder: Path) -> Cut | None:
    """Return the cut of the checkpoint in ``folder``; None if it has none, or if there is no checkpoint."""
    path = folder / FILE
    return Cut(**json.loads(path.read_text())) if path.is_file() else None


def name_layout(options: Options, chunks: int) -> str | None:
    """Return the model's layout with its chunks per rank under the options' schedule: ``straight 1``, ``looped 2``, ``v 2``.

    A table in a file is not read; None if its number of chunks fits two layouts.
    """
    if options.schedule_file is None:
        return f"{name_model_layout(choose_layout(options, 2, chunks))} {chunks}"
    if chunks == 2:
        return None
    return f"{STRAIGHT if chunks == 1 else LOOPED} {chunks}"


def guess_layout(options: Options) -> str | None:
    """Return the layout of the table that is in the options' file today; None if there is no table any more."""
    try:
        layout = choose_layout(options, 2, 2)
    except CounterflowError:
        return None
    return f"{name_model_layout(layout)} {layout.chunks}"


def digest_table(options: Options) -> str | None:
    """Return a digest of the table in the options' file; None for a named schedule."""
    return f"{options.file_table.digest:x}" if options.schedule_file is not None else None
