"""Refuse to read optimizer state that another layout wrote in a layout-dependent form.

Model keys carry global layer numbers, so model weights travel freely between schedules. The distributed
optimizer's default form (``dp_reshardable``) is flat buffers per pipeline rank: read under another
layout it can fit by shape and put moments and fp32 masters on the wrong layers, without an error.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.config import Options
from counterflow.errors import OptionError
from counterflow.megatron.batches import list_batches
from counterflow.megatron.checks import check_tables, flatten
from counterflow.megatron.tables import choose_layout, name_model_layout


def name_layout(args: Any) -> str:
    """Return the model's layout (``straight 1``, ``looped 2``, ``v 2``) under which these arguments train."""
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    schedule = getattr(args, "cf_schedule", None)
    # model_construct: a file named in an old checkpoint need not exist any more to be a file's name.
    options = Options.model_construct(schedule=schedule)
    if options.schedule_file is not None and not options.schedule_file.is_file():
        return f"that of {schedule}"
    return f"{name_model_layout(choose_layout(options, 2, chunks))} {chunks}"


def refuse_other_experts(load_base_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's first look into a checkpoint: one of another number of experts is refused there, in a line."""

    @wraps(load_base_checkpoint)
    def load(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(load_dir, args, *rest, **kwargs)
        saved = getattr((loaded[0] or {}).get("args"), "num_experts", None)
        # --use-checkpoint-args looks before this run's own number is known.
        if saved is not None and args.num_experts is not None and saved != args.num_experts:
            raise OptionError(
                f"the checkpoint in {load_dir} has {saved} experts in a MoE layer, --num-experts is {args.num_experts}: "
                "clones are no experts of a checkpoint; give the number that it was saved with"
            )
        return loaded

    return load


def refuse_other_layout(load_base_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's first look into a checkpoint, which reads its arguments and no tensor yet."""

    @wraps(load_base_checkpoint)
    def load(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(load_dir, args, *rest, **kwargs)
        saved_args = (loaded[0] or {}).get("args")
        # --use-checkpoint-args looks before this run's own layout is known.
        if saved_args is not None and hasattr(args, "virtual_pipeline_model_parallel_size"):
            _compare_layouts(saved_args, args)
        return loaded

    return load


def refuse_batches_ahead(load_base_checkpoint: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Wrap upstream's first look into a checkpoint, which says at which of the run's batch sizes it goes on."""

    @wraps(load_base_checkpoint)
    def load(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(load_dir, args, *rest, **kwargs)
        state = loaded[0] or {}
        if "args" in state and hasattr(args, "virtual_pipeline_model_parallel_size") and not args.finetune:
            flat = flatten(args)
            ranks, consumed = flat.pipeline_model_parallel_size, getattr(state["args"], "consumed_train_samples", 0)
            batches = list_batches(flat, ranks, consumed, state.get("iteration", 0))
            check_tables(flat, ranks, flat.virtual_pipeline_model_parallel_size or 1, options, batches)
        return loaded

    return load


def _compare_layouts(saved_args: Any, args: Any) -> None:
    saved, now = name_layout(saved_args), name_layout(args)
    is_flat = getattr(saved_args, "use_distributed_optimizer", False) and not getattr(
        saved_args, "dist_ckpt_optim_fully_reshardable", False
    )
    if is_flat and saved != now and not (args.no_load_optim or args.finetune):
        raise OptionError(
            f"the checkpoint's optimizer state was saved under layout {saved!r} in a form that only fits that layout; "
            f"this run has {now!r}: resume with the schedule it was saved under, or save with "
            "--dist-ckpt-optim-fully-reshardable, or load the weights alone with --no-load-optim"
        )
