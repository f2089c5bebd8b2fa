"""One rank of the tests on Transformer Engine: `eplb_worker.py`, and what its modules and the stand-in for its kernels did.

A result has "work": for each rank, how many quantizations the stand-in ran ("quantized"), entries that modules took from their
queues of weight gradients ("queued"), weights that were quantized ("weights"), and entries left in queues at the end ("left").
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

import eplb_worker
import worker
from counterflow.patching import Patches


@contextmanager
def count_work() -> Iterator[Counter[str]]:
    """Count what Transformer Engine does in the block, over the platform's stand-in."""
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.module._common import WeightGradStore
    from transformer_engine.pytorch.tensor import QuantizedTensor

    from counterflow.platform.engine.casts import counts

    work: Counter[str] = Counter()
    patches = Patches()

    def count_weights(quantize_weight: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(kwargs["tensor"], QuantizedTensor):
                work["weights"] += kwargs.get("workspace") is None or bool(kwargs.get("update_workspace", True))
            return quantize_weight(*args, **kwargs)

        return run

    take, put = WeightGradStore.pop, WeightGradStore.put

    def count_taken(store: Any) -> Any:
        work["queued"] += not store.context.empty()
        work["left"] -= not store.context.empty()
        return take(store)

    def count_put(store: Any, *args: Any) -> Any:
        work["left"] += 1
        return put(store, *args)

    patches.replace(base, "quantize_weight", count_weights)
    patches.set(WeightGradStore, "pop", count_taken)
    patches.set(WeightGradStore, "put", count_put)
    counts.clear()
    try:
        yield work
    finally:
        patches.undo()
        work["quantized"] = sum(number for name, number in counts.items() if name.startswith("quantized "))


def run(job: dict[str, Any]) -> None:
    """Run the job's case."""
    worker.prepare_writer(job["case"])
    with eplb_worker.watch_case(job["case"]) as watch:
        # Only now may the platform have been put in place.
        result = worker.run_case(job["case"], around=count_work)
    watches: list[Any] = [None] * dist.get_world_size()
    works: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(watches, watch)
    dist.all_gather_object(works, dict(result.pop("inside")))
    worker.write_result(job, {**result, "clones": eplb_worker.sum_up(watches), "work": works})
