"""The stamp of a checkpoint: the model's layout with its chunks per rank (``v 2``), and a digest if the table is from a file.

The name of a schedule determines its layout. The name of a file does not: when the checkpoint is read, the file may have another
table or be gone.
"""

from counterflow.errors import CounterflowError
from counterflow.options import Options
from counterflow.schedule.layouts import LOOPED, STRAIGHT
from counterflow.trainer.tables import choose_layout, name_model_layout


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
