"""Where Megatron's arguments, and so its checkpoints, hold the stamp of the layout that a run trains under."""

from typing import Any

from counterflow.options import Options
from counterflow.trainer import stamp


def stamp_layout(args: Any, options: Options, layout: str) -> None:
    """Write down the model's layout with its chunks (``v 2``), and of a table in a file the digest."""
    args.cf_layout = layout
    args.cf_table = stamp.digest_table(options)


def name_layout(args: Any) -> str | None:
    """Return the model's layout (``straight 1``, ``looped 2``, ``v 2``) under which these arguments train.

    None where an early version of the plugin saved them, which wrote down no more than the path of a table, and their chunks
    leave two layouts to choose from.
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
