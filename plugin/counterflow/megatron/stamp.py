"""The stamp of a run's layout in Megatron's arguments, which Megatron saves in its checkpoints."""

from typing import Any

from counterflow.options import Options
from counterflow.trainer import stamp


def stamp_layout(args: Any, options: Options, layout: str) -> None:
    """Store the model's layout and chunks per rank (``v 2``), and the digest of a table that was read from a file."""
    args.cf_layout = layout
    args.cf_table = stamp.digest_table(options)


def name_layout(args: Any) -> str | None:
    """Return the model's layout that these arguments name: ``straight 1``, ``looped 2``, ``v 2``.

    None if it is not known: early versions of the plugin stored only the path of a table, and a table with two chunks per rank
    has one of two layouts.
    """
    if (layout := getattr(args, "cf_layout", None)) is not None:
        return str(layout)
    return stamp.name_layout(_read_schedule(args), getattr(args, "virtual_pipeline_model_parallel_size", None) or 1)


def guess_layout(args: Any) -> str | None:
    """Return the layout of the table that is in the arguments' schedule file today; None if there is no table any more."""
    return stamp.guess_layout(_read_schedule(args))


def _read_schedule(args: Any) -> Options:
    # Without validation, which would refuse a file that does not exist any more.
    return Options.model_construct(schedule=getattr(args, "cf_schedule", None))
