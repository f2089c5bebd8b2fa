"""Just-in-time clones that are drawn for every micro-batch, in place of those that balance it."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.placement import EMPTY, Placement

# Of a drawn placement's clone slots, how many stay empty.
EMPTY_SHARE = 0.15


class LoanDrawer:
    """Draws just-in-time clones in place of `plan_exact`, from the counts, which are the same on all ranks.

    With ``stays`` every micro-batch gets the same ones.
    """

    def __init__(self, seed: int, *, stays: bool = False) -> None:
        self._seed, self._stays = seed, stays

    def __call__(self, counts: Array, placement: Placement, shared: Array, prices: tuple[int, int]) -> Any:
        """Return what has the drawn ``placement``: no rank has an expert twice."""
        assert placement.homes is not None
        random = np.random.default_rng([self._seed, *([] if self._stays else counts.ravel().tolist())])
        drawn, start = placement.experts.copy(), placement.cluster.rank_start
        for begin, end in zip(start, start[1:], strict=False):
            spare = begin + np.flatnonzero(shared[begin:end])
            others = np.setdiff1d(np.arange(placement.homes.shape[1]), drawn[0, begin:end])
            chosen = random.permutation(others)[: len(spare)]
            drawn[0, spare[: len(chosen)]] = chosen
            drawn[0, spare[random.random(len(spare)) < EMPTY_SHARE]] = EMPTY
        return SimpleNamespace(placement=Placement(placement.cluster, drawn, placement.homes))
