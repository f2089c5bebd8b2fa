"""Refuse optimizer state that was saved under another layout in a form that depends on the layout.

Keys of model weights have global layer numbers, so weights can be read under any schedule. The distributed optimizer's default
form (``dp_reshardable``) is flat buffers per pipeline rank. Under another layout they may fit by shape, and moments and fp32
masters would go to the wrong layers without an error.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.errors import OptionError
from counterflow.megatron.batches import list_batches
from counterflow.megatron.checks import check_tables, flatten
from counterflow.megatron.patterns import check_same_cut
from counterflow.megatron.stamp import guess_layout, name_layout
from counterflow.megatron.v_layout.embeddings import separate_copies
from counterflow.options import Options
from counterflow.schedule.layouts import V
from counterflow.trainer.tables import choose_layout, name_model_layout


def guard_checkpoint(load_base_checkpoint: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Wrap Megatron's first look into a checkpoint, which reads its arguments before any sharded tensor is read.

    Under a schedule it refuses another layout, and batch sizes ahead that have no table. In a V it then separates the copies of
    the embedding. With clones it refuses another number of experts.
    """
    printed: set[str] = set()
    is_v = options.schedule is not None and name_model_layout(choose_layout(options, 2, 2)) == V

    @wraps(load_base_checkpoint)
    def load(load_dir: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = load_base_checkpoint(load_dir, args, *rest, **kwargs)
        state = loaded[0] or {}
        # --use-checkpoint-args reads the checkpoint before this run's own layout is known.
        if options.schedule is not None and "args" in state and hasattr(args, "virtual_pipeline_model_parallel_size"):
            refuse_other_layout(load_dir, state["args"], args, printed)
            refuse_batches_ahead(state, args, options)
        if is_v:
            # Checkpoints on a node's own disk (--non-persistent-ckpt-type local) are read past `serialization.load`.
            loaded = separate_copies(loaded)
        if options.eplb:
            refuse_other_experts(load_dir, state.get("args"), args)
        return loaded

    return load


def refuse_other_experts(load_dir: Any, saved_args: Any, args: Any) -> None:
    """Refuse a checkpoint with another number of experts."""
    saved = getattr(saved_args, "num_experts", None)
    # --use-checkpoint-args reads the checkpoint before this run's own number is known.
    if saved is not None and args.num_experts is not None and saved != args.num_experts:
        raise OptionError(
            f"the checkpoint in {load_dir} has {saved} experts in a MoE layer, --num-experts is {args.num_experts}: "
            "clones are no experts of a checkpoint; give the number that it was saved with"
        )


def refuse_other_layout(load_dir: Any, saved_args: Any, args: Any, printed: set[str]) -> None:
    """Refuse optimizer state of another layout; print notes about tables that are not in ``printed`` yet."""
    for note in (_compare_layouts(load_dir, saved_args, args), _compare_tables(load_dir, saved_args, args)):
        # Megatron reads the checkpoint's arguments more than once.
        if note is not None and note not in printed and args.rank == 0:
            print(f"counterflow: {note}", flush=True)
            printed.add(note)


def refuse_batches_ahead(state: dict[str, Any], args: Any, options: Options) -> None:
    """Refuse a checkpoint after which the run has batch sizes for which the schedule has no table."""
    if not args.finetune:
        flat = flatten(args)
        ranks, consumed = flat.pipeline_model_parallel_size, getattr(state["args"], "consumed_train_samples", 0)
        batches = list_batches(flat, ranks, consumed, state.get("iteration", 0))
        check_tables(flat, ranks, flat.virtual_pipeline_model_parallel_size or 1, options, batches)


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
    check_same_cut(saved_args, args)
    return note


def _guess_layout(load_dir: Any, saved_args: Any) -> tuple[str, str]:
    doubt = f"the checkpoint in {load_dir} does not say which layout its table {saved_args.cf_schedule} had, 'looped 2' or 'v 2'"
    guess = guess_layout(saved_args)
    if guess is None:
        raise OptionError(
            f"{doubt}, its optimizer state only fits that layout, and there is no such table any more: put it back where it was "
            "or load the weights alone with --no-load-optim"
        )
    return guess, f"{doubt}; taken for the {guess!r} that the file holds today"


def _compare_tables(load_dir: Any, saved_args: Any, args: Any) -> str | None:
    """Return a note to print if the file has another table now than in the run that saved the checkpoint."""
    before, now = (getattr(one, "cf_table", None) for one in (saved_args, args))
    if before is None or now is None or before == now or saved_args.cf_schedule != args.cf_schedule or args.finetune:
        return None
    return f"{args.cf_schedule} has another table than the run that saved the checkpoint in {load_dir} ({now}, then {before})"
