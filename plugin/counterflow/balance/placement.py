"""A placement: which logical expert each slot holds, layer by layer."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

EMPTY = -1


@dataclass(frozen=True)
class Placement:
    """Slots of each layer and what they hold.

    ``experts``: ``int64[layers, slots]``, the logical expert of a slot or `EMPTY`. ``homes``: ``int64[layers, experts]``, the
    slot where an expert's own weights live, or None where no copy is more than another (serving). Its other slots are clones.
    Raises `BalanceError` for arrays that do not fit the cluster or each other: compiled code takes what they say on trust.
    """

    cluster: Cluster
    experts: Array
    homes: Array | None = None

    def __post_init__(self) -> None:
        held, slots = self.experts, self.cluster.slots
        if held.dtype.kind != "i" or held.ndim != 2 or held.shape[1] != slots or held.min(initial=EMPTY) < EMPTY:
            raise BalanceError(
                f"experts of type {held.dtype} and shape {held.shape}; "
                f"allowed: integers from {EMPTY}, which is an empty slot, [layers, {slots} slots]"
            )
        if self.homes is not None:
            _check_homes(self.homes, held)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.experts.shape[0])


def _check_homes(homes: Array, held: Array) -> None:
    layers, slots = held.shape
    if homes.dtype.kind != "i" or homes.ndim != 2 or homes.shape[0] != layers:
        raise BalanceError(
            f"homes of type {homes.dtype} and shape {homes.shape}; allowed: integers, [layers, experts] of {layers} layers"
        )
    if homes.min(initial=0) < 0 or homes.max(initial=0) >= slots:
        raise BalanceError(f"homes from slot {homes.min()} to {homes.max()}; allowed: 0 to {slots - 1}")
    experts = homes.shape[1]
    wrong = np.take_along_axis(held, homes, 1) != np.arange(experts)
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        slot = homes[layer, expert]
        raise BalanceError(
            f"layer {layer}: slot {slot}, the home of expert {expert}, holds {held[layer, slot]}; allowed: the expert itself"
        )
    if held.max(initial=EMPTY) >= experts:
        raise BalanceError(f"expert {held.max()} in a slot beside homes of {experts} experts; allowed: experts with a home")


def make_home_placement(layers: int, experts: int, ranks: int, clones_per_rank: int, nodes: int = 1) -> Placement:
    """Return homes where Megatron and DeepSpeed put them, in order, E/R on each rank, and empty slots for clones behind them.

    Raises `BalanceError` where experts do not divide by ranks, or clones are more than experts.
    """
    if experts % take_whole(ranks, "ranks", 1, error=BalanceError):
        raise BalanceError(f"{experts} experts on {ranks} ranks; allowed: a number of ranks that divides the experts")
    if take_whole(clones_per_rank, "clones per rank", 0, error=BalanceError) > experts:
        raise BalanceError(f"{clones_per_rank} clones per rank; allowed: 0 to {experts}, the number of experts")
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
    return divide_loads(rank_loads.mean(-1), rank_loads.max(-1))


def divide_loads(loads: Array, others: Array) -> Array:
    """Return loads over others, 1 where those are 0: where there is no load, nothing is less balanced than it could be."""
    ratio: Array = np.divide(loads, others, out=np.ones(np.shape(loads)), where=others > 0)
    return ratio
