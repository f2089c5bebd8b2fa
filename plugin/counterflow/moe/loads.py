"""Load tracking: count tokens per expert and rank in every layer and micro-batch, without waiting for a device."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.placement import EMPTY, Placement
from counterflow.errors import BalanceError

# Where tokens are computed: at homes, by clones that stay for a step or more, by clones of one micro-batch.
TIERS = ("homes", "resident", "just in time")


class Loads(NamedTuple):
    """Tokens of one step, ``int64[micro-batches, layers, …]``: per expert, per rank, and per one of `TIERS`.

    The last two are None under the even split, which follows from the first.
    """

    experts: Array
    ranks: Array | None
    tiers: Array | None


def sum_by_tier(tokens: Array, placement: Placement, standing: Placement) -> Array:
    """Return ``int64[..., 3]``, the tokens of each of `TIERS`; ``tokens``, ``int64[..., slots]``, are those of one layer's slots.

    ``placement`` is the one that the tokens were split by, ``standing`` the same without the clones of one micro-batch.
    """
    assert placement.homes is not None
    tier = np.where(standing.experts[0] == EMPTY, 2, 1)
    tier[placement.homes[0]] = 0
    return np.stack([tokens[..., tier == one].sum(-1) for one in range(len(TIERS))], -1)


class LoadTracker:
    """Keeps the loads that the layers of this pipeline rank report, until `take` returns them."""

    def __init__(self, layers: int) -> None:
        self._counts: list[list[tuple[Array, Array, Array]]] = [[] for _ in range(layers)]
        self._own: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def add(self, layer: int, experts: Array, ranks: Array, tiers: Array) -> None:
        """Keep the tokens of all sources in a layer's next micro-batch: ``int64[experts]``, ``int64[ranks]``, ``int64[3]``."""
        self._counts[layer].append((experts, ranks, tiers))

    def add_own(self, layer: int, experts: torch.Tensor) -> None:
        """Keep this source's own tokens, ``int64[experts]``, on the device; `take` sums them over the sources."""
        self._own[layer].append(experts)

    def forget(self) -> None:
        """Drop the loads of a step that did not end."""
        for counted, own in zip(self._counts, self._own, strict=True):
            counted.clear()
            own.clear()

    def take(self, microbatches: int, sources: dist.ProcessGroup) -> Loads:
        """Return one step's loads and forget them; ``sources`` are the ranks whose tokens are split together.

        A layer that ran several times in a micro-batch (a repeated prediction layer) has the sum of these runs. A layer that
        reported nothing has zeros: a frozen one, for example, that runs without gradients. Raises `BalanceError` if no layer
        reported anything.
        """
        own, counts = [list(kept) for kept in self._own], [list(kept) for kept in self._counts]
        self.forget()
        if any(own):
            nothing = torch.zeros_like(next(kept[0] for kept in own if kept))
            summed = torch.stack([_fold(torch.stack(kept or [nothing] * microbatches), microbatches) for kept in own], dim=1)
            dist.all_reduce(summed, group=sources)
            return Loads(summed.cpu().numpy(), None, None)
        if not any(counts):
            raise BalanceError("no MoE layer reported loads in a training step: there is nothing to balance, drop --cf-eplb")
        some = next(kept[0] for kept in counts if kept)
        none = np.zeros_like(some[0]), np.zeros_like(some[1]), np.zeros_like(some[2])
        experts, ranks, tiers = (
            np.stack([_fold(torch.from_numpy(np.stack(rows)), microbatches).numpy() for rows in part], axis=1)
            for part in zip(*(zip(*(kept or [none] * microbatches), strict=True) for kept in counts), strict=True)
        )
        return Loads(experts, ranks, tiers)


def _fold(rows: torch.Tensor, microbatches: int) -> torch.Tensor:
    return rows.view(microbatches, -1, rows.shape[-1]).sum(1)
