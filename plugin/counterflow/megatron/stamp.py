"""What a run's arguments, and so its checkpoints, say of the layout that it trains under.

A name of a schedule is enough to know its layout; of a table in a file it is not: the file may be another, or gone, by the time
that a checkpoint is read.
"""

from typing import Any

from counterflow.errors import CounterflowError
from counterflow.options import Options
from counterflow.schedule.layouts import LOOPED, STRAIGHT
from counterflow.trainer.tables import choose_layout, name_model_layout, read_table


def stamp_layout(args: Any, options: Options, layout: str) -> None:
    """Write down the model's layout with its chunks (``v 2``), and of a table in a file the digest."""
    args.cf_layout = layout
    args.cf_table = f"{read_table(options).digest:x}" if options.schedule_file is not None else None


def name_layout(args: Any) -> str | None:
    """Return the model's layout (``straight 1``, ``looped 2``, ``v 2``) under which these arguments train.

    None where an early version of the plugin saved them, which wrote down no more than the path of a table, and their chunks
    leave two layouts to choose from.
    """
    if (layout := getattr(args, "cf_layout", None)) is not None:
        return str(layout)
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    # model_construct: a file named in a checkpoint need not exist any more to be a file's name.
    options = Options.model_construct(schedule=getattr(args, "cf_schedule", None))
    if options.schedule_file is None:
        return f"{name_model_layout(choose_layout(options, 2, chunks))} {chunks}"
    if chunks == 2:
        return None
    return f"{STRAIGHT if chunks == 1 else LOOPED} {chunks}"


def guess_layout(args: Any) -> str | None:
    """Return the layout that the file named in these arguments holds today; None where it has no such table any more."""
    options = Options.model_construct(schedule=args.cf_schedule)
    try:
        layout = choose_layout(options, 2, 2)
    except CounterflowError:
        return None
    return f"{name_model_layout(layout)} {layout.chunks}"
