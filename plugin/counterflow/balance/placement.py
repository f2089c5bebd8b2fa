"""A placement: which logical expert each slot holds, layer by layer."""

from dataclasses import dataclass

import numpy as np

from counterflow.balance.cluster import Array, Cluster, make_cluster
from counterflow.errors import BalanceError

EMPTY = -1


@dataclass(frozen=True)
class Placement:
    """Slots of each layer and what they hold.

    ``experts``: ``int64[layers, slots]``, the logical expert of a slot or `EMPTY`. ``homes``: ``int64[layers, experts]``, the
    slot where an expert's own weights live, or None where no copy is more than another (serving). Its other slots are clones.
    """

    cluster: Cluster
    experts: Array
    homes: Array | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.experts.shape[0])


def make_home_placement(layers: int, experts: int, ranks: int, clones_per_rank: int, nodes: int = 1) -> Placement:
    """Return homes where Megatron and DeepSpeed put them, in order, E/R on each rank, and empty slots for clones behind them.

    Raises `BalanceError` where experts do not divide by ranks.
    """
    if ranks < 1 or experts % ranks:
        raise BalanceError(f"{experts} experts on {ranks} ranks; allowed: a number of ranks that divides the experts")
    if clones_per_rank < 0:
        raise BalanceError(f"{clones_per_rank} clones per rank; allowed: 0 or more")
    own = experts // ranks
    width = own + clones_per_rank
    cluster = make_cluster(ranks, ranks * width, nodes)
    slots = np.arange(ranks * width)
    held = np.where(slots % width < own, slots // width * own + slots % width, EMPTY)
    homes = np.flatnonzero(held != EMPTY)
    return Placement(cluster, np.tile(held, (layers, 1)), np.tile(homes, (layers, 1)))


def count_copies(placement: Placement, experts: int) -> Array:
    """Return ``int64[layers, experts]``, how many slots hold each expert."""
    counts = np.zeros((placement.layers, experts), np.int64)
    layer, slot = np.nonzero(placement.experts != EMPTY)
    np.add.at(counts, (layer, placement.experts[layer, slot]), 1)
    return counts


def share_evenly(loads: Array, placement: Placement) -> Array:
    """Return ``float64[layers, slots]``: each copy of an expert takes the same share of its load, as EPLB assumes."""
    held = np.maximum(placement.experts, 0)
    shares = np.take_along_axis(loads / np.maximum(count_copies(placement, loads.shape[1]), 1), held, 1)
    return np.where(placement.experts != EMPTY, shares, 0.0)


def sum_by_rank(slots: Array, cluster: Cluster) -> Array:
    """Return ``[layers, ranks]``: what the slots of each rank sum to, of ``[layers, slots]``."""
    sums: Array = np.add.reduceat(slots, cluster.rank_start[:-1], axis=-1)
    return sums


def measure_balancedness(rank_loads: Array) -> Array:
    """Return mean over slowest rank along the last axis: 1 is perfect, also where there is no load at all."""
    slowest = rank_loads.max(-1)
    balancedness: Array = np.divide(rank_loads.mean(-1), slowest, out=np.ones(slowest.shape), where=slowest > 0)
    return balancedness
