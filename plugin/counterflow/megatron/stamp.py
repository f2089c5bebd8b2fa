"""Write the layout of the model into Megatron's arguments, which checkpoints store, and read it back.

The name of a schedule determines its layout. The path of a table does not: when the checkpoint is read, the file may hold
another table, or be gone.
"""

from typing import Any

from counterflow.errors import CounterflowError
from counterflow.options import Options
from counterflow.schedule.layouts import LOOPED, STRAIGHT
from counterflow.trainer.tables import choose_layout, name_model_layout, read_table


def stamp_layout(args: Any, options: Options, layout: str) -> None:
    """Store the model's layout and chunks per rank (``v 2``), and the digest of a table that was read from a file."""
    args.cf_layout = layout
    args.cf_table = f"{read_table(options).digest:x}" if options.schedule_file is not None else None


def name_layout(args: Any) -> str | None:
    """Return the model's layout that these arguments name: ``straight 1``, ``looped 2``, ``v 2``.

    None if it is not known: early versions of the plugin stored only the path of a table, and two chunks per rank fit two
    layouts.
    """
    if (layout := getattr(args, "cf_layout", None)) is not None:
        return str(layout)
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    # model_construct does not validate, so the file that a checkpoint names need not exist any more.
    options = Options.model_construct(schedule=getattr(args, "cf_schedule", None))
    if options.schedule_file is None:
        return f"{name_model_layout(choose_layout(options, 2, chunks))} {chunks}"
    if chunks == 2:
        return None
    return f"{STRAIGHT if chunks == 1 else LOOPED} {chunks}"


def guess_layout(args: Any) -> str | None:
    """Return the layout of the table that the file named in these arguments holds today; None if there is no such table."""
    options = Options.model_construct(schedule=args.cf_schedule)
    try:
        layout = choose_layout(options, 2, 2)
    except CounterflowError:
        return None
    return f"{name_model_layout(layout)} {layout.chunks}"
