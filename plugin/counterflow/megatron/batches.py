"""List the batch sizes that a training run will have, and the number of micro-batches of each.

Megatron's own calculator returns both for a number of consumed samples, so all flags of its version count:
``--global-batch-size``, ``--rampup-batch-size`` (0.17; later versions ignore it), ``--step-batch-size-schedule`` (since 0.18)
and ``--decrease-batch-size-if-needed``.
"""

import inspect
import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from counterflow.errors import OptionError


@dataclass(frozen=True)
class Batch:
    """A batch of ``samples`` over all replicas; each replica runs ``microbatches``."""

    samples: int
    microbatches: int


def get_argument(args: Any, name: str, default: Any) -> Any:
    """Return an argument, or the default if it is missing or None."""
    value = getattr(args, name, None)
    return default if value is None else value


def count_model_ranks(args: Any, ranks: int) -> int:
    """Return the number of ranks of one data-parallel replica."""
    return int(get_argument(args, "tensor_model_parallel_size", 1) * get_argument(args, "context_parallel_size", 1) * ranks)


def count_data_ranks(args: Any, ranks: int) -> int:
    """Return the number of data-parallel replicas, including those that share a weight's shards, as each reads its own data."""
    return count_ranks(args) // count_model_ranks(args, ranks)


def count_ranks(args: Any) -> int:
    """Return the number of ranks of the run; the launcher's ``WORLD_SIZE`` wins over the arguments."""
    return int(os.environ.get("WORLD_SIZE", get_argument(args, "world_size", 1)))


def count_weight_shards(args: Any, which: str = "") -> int:
    """Return the number of data-parallel ranks over which generalized tensor parallelism cuts a weight.

    ``which`` is "" for dense weights and ``expert_`` for those of experts.
    """
    tensor = get_argument(args, "tensor_model_parallel_size", 1)
    tensor = get_argument(args, "expert_tensor_parallel_size", tensor) if which else tensor
    return int(max(1, get_argument(args, f"{which}tensor_parallel_num_weight_shards", tensor) // tensor))


def list_batches(args: Any, ranks: int, consumed: int = 0, iteration: int = 0) -> list[Batch]:
    """Return the batch sizes of a run on ``ranks`` pipeline ranks, in order.

    The list starts at step ``iteration``, after ``consumed`` samples. It has the first size only if the length of the run is
    not given, and is empty if the micro-batch size is not known. Raises `OptionError` for sizes that Megatron would refuse, at
    the start or in the middle of the run.
    """
    micro = getattr(args, "micro_batch_size", None)
    if micro is None:
        return []
    replicas = count_data_ranks(args, ranks)
    calculator = _make_calculator(args, replicas)
    batches: list[Batch] = []
    steps: int | None = 0
    while steps is not None:
        calculator.update(consumed, False)
        found = Batch(calculator.get_current_running_global_batch_size(), calculator.get())
        if found not in batches[-1:]:
            _check_batch(found, batches, micro, replicas)
            batches.append(found)
        drawn = found.microbatches * micro * replicas
        steps = _count_steps(calculator, args, consumed, iteration, drawn)
        consumed, iteration = consumed + (steps or 0) * drawn, iteration + (steps or 0)
    return batches


def _check_batch(found: Batch, before: list[Batch], micro: int, replicas: int) -> None:
    if not found.microbatches or found.samples % (micro * replicas):
        raise OptionError(
            f"a batch of {found.samples} samples does not divide into micro-batches of {micro} on {replicas} data-parallel "
            f"replicas: give batch sizes that are multiples of {micro * replicas}"
        )
    if before and found.microbatches < before[-1].microbatches:
        raise OptionError(
            f"a batch of {before[-1].samples} samples is followed by one of {found.samples}, where Megatron-Core ends a run: "
            "give batch sizes that grow"
        )


def _count_steps(calculator: Any, args: Any, consumed: int, iteration: int, drawn: int) -> int | None:
    """Return the number of steps, of ``drawn`` samples each, until the batch size may change; None if the run ends before."""
    # A step schedule has thresholds. A ramp has none: there the size itself tells the phase.
    thresholds = [samples for samples, _ in getattr(calculator, "schedule", ())]

    def find_phase(steps: int) -> tuple[int, int]:
        samples = consumed + steps * drawn
        calculator.update(samples, False)
        return bisect_right(thresholds, samples), calculator.get_current_global_batch_size()

    if last := getattr(args, "train_iters", None):
        left = last - iteration - 1
    else:
        left = (get_argument(args, "train_samples", 0) - consumed - 1) // drawn
    steps = 1 + bisect_right(range(1, left + 1), find_phase(0), key=find_phase)
    return steps if steps <= left else None


def _make_calculator(args: Any, replicas: int) -> Any:
    from megatron.core import num_microbatches_calculator as upstream

    micro = args.micro_batch_size
    arguments = {
        "rank": -1,  # the calculator of rank 0 would write to the log
        "rampup_batch_size": getattr(args, "rampup_batch_size", None),
        "global_batch_size": get_argument(args, "global_batch_size", micro * replicas // count_weight_shards(args)),
        "micro_batch_size": micro,
        "data_parallel_size": replicas,
        "decrease_batch_size_if_needed": get_argument(args, "decrease_batch_size_if_needed", False),
        "step_batch_size_schedule": getattr(args, "step_batch_size_schedule", None),
        "seq_length": getattr(args, "seq_length", None) or getattr(args, "encoder_seq_length", None),
    }
    build = upstream._build_num_microbatches_calculator
    try:
        return build(**{name: arguments[name] for name in inspect.signature(build).parameters})
    except (AssertionError, ValueError, ArithmeticError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise OptionError(f"Megatron-Core cannot cut these batches into micro-batches: {reason}") from None
