"""Where Megatron's arguments, and so its checkpoints, hold the stamp of the layout that a run trains under."""

from typing import Any

from counterflow.options import Options
from counterflow.trainer import stamp


def stamp_layout(args: Any, options: Options, layout: str) -> None:
    """Store the model's layout and chunks per rank (``v 2``), and the digest of a table that was read from a file."""
    args.cf_layout = layout
    args.cf_table = stamp.digest_table(options)


def name_layout(args: Any) -> str | None:
    """Return the model's layout that these arguments name: ``straight 1``, ``looped 2``, ``v 2``.

    None if it is not known: early versions of the plugin stored only the path of a table, and two chunks per rank fit two
    layouts.
    """
    if (layout := getattr(args, "cf_layout", None)) is not None:
        return str(layout)
    return stamp.name_layout(_read_schedule(args), getattr(args, "virtual_pipeline_model_parallel_size", None) or 1)


def guess_layout(args: Any) -> str | None:
    """Return the layout that the file named in these arguments holds today; None where it has no such table any more."""
    return stamp.guess_layout(_read_schedule(args))


def _read_schedule(args: Any) -> Options:
    # model_construct: a file named in a checkpoint need not exist any more to be a file's name.
    return Options.model_construct(schedule=getattr(args, "cf_schedule", None))
