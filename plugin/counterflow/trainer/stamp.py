"""What a checkpoint is stamped with: the model's layout with its chunks (``v 2``), and of a table in a file a digest.

A name of a schedule is enough to know its layout; of a table in a file it is not: the file may be another, or gone, by the time
that a checkpoint is read.
"""

from counterflow.errors import CounterflowError
from counterflow.options import Options
from counterflow.schedule.layouts import LOOPED, STRAIGHT
from counterflow.trainer.tables import choose_layout, name_model_layout, read_table


def name_layout(options: Options, chunks: int) -> str | None:
    """Return the model's layout with its chunks per rank (``straight 1``, ``looped 2``, ``v 2``) that the options' schedule has.

    None for a table in a file, which is not read, where its chunks leave two layouts to choose from.
    """
    if options.schedule_file is None:
        return f"{name_model_layout(choose_layout(options, 2, chunks))} {chunks}"
    if chunks == 2:
        return None
    return f"{STRAIGHT if chunks == 1 else LOOPED} {chunks}"


def guess_layout(options: Options) -> str | None:
    """Return the layout that the options' file holds today; None where it has no such table any more."""
    try:
        layout = choose_layout(options, 2, 2)
    except CounterflowError:
        return None
    return f"{name_model_layout(layout)} {layout.chunks}"


def digest_table(options: Options) -> str | None:
    """Return a digest of the table in the options' file; None where a schedule is named."""
    return f"{read_table(options).digest:x}" if options.schedule_file is not None else None
