"""Which batch sizes a training run will have, and into how many micro-batches each is cut.

Megatron's own calculator says so for a number of consumed samples, under whatever flags its version has for it: a constant size,
``--rampup-batch-size`` (0.17; ignored since), ``--step-batch-size-schedule`` (since 0.18), ``--decrease-batch-size-if-needed``.
"""

import inspect
import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from counterflow.errors import OptionError


@dataclass(frozen=True)
class Batch:
    """A batch of ``samples`` over all replicas, in ``microbatches`` of each replica."""

    samples: int
    microbatches: int


def get_argument(args: Any, name: str, default: Any) -> Any:
    """Return an argument, the default where it is missing or None."""
    value = getattr(args, name, None)
    return default if value is None else value


def count_model_ranks(args: Any, ranks: int) -> int:
    """Return on how many ranks one replica of the data lies."""
    return int(get_argument(args, "tensor_model_parallel_size", 1) * get_argument(args, "context_parallel_size", 1) * ranks)


def count_data_ranks(args: Any, ranks: int) -> int:
    """Return how many data-parallel replicas there are; those that share a weight's shards have data of their own too."""
    return count_ranks(args) // count_model_ranks(args, ranks)


def count_ranks(args: Any) -> int:
    """Return how many ranks the run has: the launcher's word counts."""
    return int(os.environ.get("WORLD_SIZE", get_argument(args, "world_size", 1)))


def count_weight_shards(args: Any, which: str = "") -> int:
    """Return over how many data-parallel ranks each weight is cut (generalized tensor parallelism); ``which``: ``expert_``."""
    tensor = get_argument(args, "tensor_model_parallel_size", 1)
    tensor = get_argument(args, "expert_tensor_parallel_size", tensor) if which else tensor
    return int(max(1, get_argument(args, f"{which}tensor_parallel_num_weight_shards", tensor) // tensor))


def list_batches(args: Any, ranks: int, consumed: int = 0, iteration: int = 0) -> list[Batch]:
    """Return the batch sizes of a run on ``ranks`` pipeline ranks, in order; from ``iteration`` steps of ``consumed`` samples on.

    Of a run that does not say how long it is, the first; [] where the micro-batch size is not known. Raises `OptionError` for
    sizes that Megatron would refuse, at once or when it came to them.
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
    """Return after how many steps, of ``drawn`` samples, the calculator gets to another phase; None where the run ends before."""
    # Those of a step schedule; a ramp has none and grows steadily.
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
    given = {
        "rank": -1,  # rank 0's would log
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
        return build(**{name: given[name] for name in inspect.signature(build).parameters})
    except (AssertionError, ValueError, ArithmeticError) as error:
        said = str(error).rstrip(".") or type(error).__name__
        raise OptionError(f"Megatron-Core cannot cut these batches into micro-batches: {said}") from None
