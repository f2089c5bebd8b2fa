"""The share of force-balanced: a step's forward passes once more, as tokens are routed and with as many on every rank.

Both run behind the step's backward, without gradients, as an evaluation does: on the same micro-batches and weights, with the
same clones. Losses stay bit for bit, since nothing that a training step reads is changed: no gradient, no random number, no
count of tokens. A backward would add gradients that could not be taken back without a copy of all of them.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from counterflow.devices import capture_random, find_device, restore_random, wait_for_device
from counterflow.megatron.loop import find_arguments
from counterflow.trainer.balanced_layers import BalancedLayers


class KeptBatches:
    """An iterator over micro-batches that keeps what was drawn, as long as the step lasts."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.kept: list[Any] = []

    def __iter__(self) -> "KeptBatches":
        return self

    def __next__(self) -> Any:
        drawn = next(self._source)
        self.kept.append(copy.copy(drawn))
        return drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def keep_batches(source: Any) -> Any:
    """Return what a step draws its micro-batches from, an iterator, None or a list of them, such that `draw_again` can."""
    made: dict[int, KeptBatches] = {}

    def keep(one: Any) -> Any:
        return None if one is None else made.setdefault(id(one), KeptBatches(one))

    return [keep(one) for one in source] if isinstance(source, list) else keep(source)


def draw_again(kept: Any) -> Any:
    """Return what draws the micro-batches again that were drawn from what `keep_batches` returned."""
    made: dict[int, Any] = {}

    def draw(one: Any) -> Any:
        return None if one is None else made.setdefault(id(one), itertools.cycle(map(copy.copy, one.kept)))

    return [draw(one) for one in kept] if isinstance(kept, list) else draw(kept)


def time_forwards(
    run: Callable[[], Any], chunks: list[Any], layers: BalancedLayers | None, *, forced_first: bool
) -> tuple[float, float]:
    """Return the seconds of the step's forward passes with as many tokens on every rank, and as they are routed.

    ``run`` runs them. Both are the means of all ranks, which begin and end together. Every rank calls it; one without MoE layers
    passes None.
    """
    times = {}
    with evaluate(chunks):
        for is_forced in (forced_first, not forced_first):
            with ExitStack() as stack:
                if layers is not None:
                    stack.enter_context(layers.measure(is_forced=is_forced))
                dist.barrier()
                begun = time.monotonic()
                run()
                wait_for_device()
                dist.barrier()
                times[is_forced] = time.monotonic() - begun
    summed = torch.tensor([times[True], times[False]], dtype=torch.float64, device=find_device())
    dist.all_reduce(summed)
    forced, routed = (summed / dist.get_world_size()).tolist()
    return forced, routed


@contextmanager
def evaluate(chunks: list[Any]) -> Iterator[None]:
    """Evaluate inside the block: no gradients, no dropout, and random numbers that are as they were afterwards."""
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    machine = get_rerun_state_machine() if find_arguments() is not None else None
    mode, device = machine and machine.get_mode(), find_device()
    random = capture_random(device)
    for chunk in chunks:
        chunk.eval()
    if machine is not None:
        machine.set_mode(RerunMode.DISABLED)
    try:
        with torch.no_grad():
            yield
    finally:
        if machine is not None:
            machine.set_mode(mode)
        for chunk in chunks:
            chunk.train()
        restore_random(device, random)
