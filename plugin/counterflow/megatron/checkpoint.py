"""Refuse to read optimizer state that another layout wrote in a layout-dependent form.

Model keys carry global layer numbers, so model weights travel freely between schedules. The distributed
optimizer's default form (``dp_reshardable``) is flat buffers per pipeline rank: read under another
layout it can fit by shape and put moments and fp32 masters on the wrong layers, without an error.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.errors import OptionError
from counterflow.megatron.batches import list_batches
from counterflow.megatron.checks import check_tables, flatten
from counterflow.megatron.stamp import guess_layout, name_layout
from counterflow.options import Options


def refuse_other_experts(load_base_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's first look into a checkpoint: refuse one with another number of experts."""

    @wraps(load_base_checkpoint)
    def load(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(load_dir, args, *rest, **kwargs)
        saved = getattr((loaded[0] or {}).get("args"), "num_experts", None)
        # --use-checkpoint-args reads the checkpoint before this run's own number is known.
        if saved is not None and args.num_experts is not None and saved != args.num_experts:
            raise OptionError(
                f"the checkpoint in {load_dir} has {saved} experts in a MoE layer, --num-experts is {args.num_experts}: "
                "clones are no experts of a checkpoint; give the number that it was saved with"
            )
        return loaded

    return load


def refuse_other_layout(load_base_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's first look into a checkpoint, before any tensor is read: refuse state of another layout."""
    printed: set[str] = set()

    @wraps(load_base_checkpoint)
    def load(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(load_dir, args, *rest, **kwargs)
        saved_args = (loaded[0] or {}).get("args")
        # --use-checkpoint-args reads the checkpoint before this run's own layout is known.
        if saved_args is not None and hasattr(args, "virtual_pipeline_model_parallel_size"):
            notes = [_compare_layouts(load_dir, saved_args, args), _compare_tables(load_dir, saved_args, args)]
            for note in notes:
                # Megatron reads the checkpoint's arguments more than once.
                if note is not None and note not in printed and args.rank == 0:
                    print(f"counterflow: {note}", flush=True)
                    printed.add(note)
        return loaded

    return load


def refuse_batches_ahead(load_base_checkpoint: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Wrap Megatron's first look into a checkpoint: refuse batch sizes, from the step it was saved at on, that have no table."""

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


def _compare_layouts(load_dir: Any, saved_args: Any, args: Any) -> str | None:
    """Refuse optimizer state that does not fit this run's layout; return a note to print if the saved layout is a guess."""
    is_flat = getattr(saved_args, "use_distributed_optimizer", False) and not getattr(
        saved_args, "dist_ckpt_optim_fully_reshardable", False
    )
    if not is_flat or args.no_load_optim or args.finetune:
        return None
    saved, now, note = name_layout(saved_args), name_layout(args), None
    if saved is None:
        saved, note = _guess_layout(load_dir, saved_args)
    if saved != now:
        raise OptionError(
            f"the checkpoint's optimizer state was saved under layout {saved!r} in a form that only fits that layout; "
            f"this run has {now!r}: resume with the schedule it was saved under, or save with "
            "--dist-ckpt-optim-fully-reshardable, or load the weights alone with --no-load-optim" + (f"; {note}" if note else "")
        )
    return note


def _guess_layout(load_dir: Any, saved_args: Any) -> tuple[str, str]:
    unsaid = f"the checkpoint in {load_dir} does not say which layout its table {saved_args.cf_schedule} had, 'looped 2' or 'v 2'"
    guess = guess_layout(saved_args)
    if guess is None:
        raise OptionError(
            f"{unsaid}, its optimizer state only fits that layout, and there is no such table any more: put it back where it was "
            "or load the weights alone with --no-load-optim"
        )
    return guess, f"{unsaid}; taken for the {guess!r} that the file holds today"


def _compare_tables(load_dir: Any, saved_args: Any, args: Any) -> str | None:
    """Return a note to print if the table in the file is another one than in the run that saved the checkpoint."""
    before, now = (getattr(one, "cf_table", None) for one in (saved_args, args))
    if before is None or now is None or before == now or saved_args.cf_schedule != args.cf_schedule or args.finetune:
        return None
    return f"{args.cf_schedule} has another table than the run that saved the checkpoint in {load_dir} ({now}, then {before})"
