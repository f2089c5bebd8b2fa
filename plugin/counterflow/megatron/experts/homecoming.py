"""Delay Megatron's reduction of expert gradients until the gradients of clones have been added at the homes."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from counterflow.megatron.state import expert_buckets, of_chunk
from counterflow.moe.clones import Clones


def hold_reductions(chunk: Any, clones: Clones) -> None:
    """Let the reductions of a chunk's expert gradients wait for the gradients of its clones."""
    kept = of_chunk(chunk)
    kept.clones = clones
    for group in chunk.expert_parallel_bucket_groups:
        expert_buckets[group] = kept


def start_when_home(start_grad_sync: Callable[..., None]) -> Callable[..., None]:
    """Wrap the start of a bucket group's reduction: with expert gradients it waits until those of clones are home."""

    @wraps(start_grad_sync)
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = expert_buckets.get(self)
        if kept is None or kept.clones is None or kept.clones.are_home:
            start_grad_sync(self, *args, **kwargs)
        else:
            kept.due.add(partial(start_grad_sync, self, *args, **kwargs))

    return start


def finish_when_home(finish_grad_sync: Callable[..., None]) -> Callable[..., None]:
    """Wrap the end of a chunk's reductions: first finish the clones' gradients, then start the reductions that waited."""

    @wraps(finish_grad_sync)
    def finish(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = of_chunk(self)
        if kept.clones is not None:
            kept.clones.finish_homecoming()
            kept.due.start()
        finish_grad_sync(self, *args, **kwargs)

    return finish
