"""A placement: the logical expert in each slot, layer by layer."""

from copy import copy
from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

EMPTY = -1


@dataclass(frozen=True)
class Placement:
    """The expert in each slot of each layer.

    ``experts``, ``int64[layers, slots]``, has the logical expert of a slot, or `EMPTY`. ``homes``, ``int64[layers, experts]``,
    has the slot of an expert's home; its other slots are clones. It is None if all copies are alike, as in serving. Raises
    `BalanceError` for arrays that do not fit the cluster or each other, since compiled code does not check them.
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

    def refill(self, experts: Array) -> "Placement":
        """Return a placement with other ``experts`` in its clone slots. A planner filled them: they are not checked again."""
        other = copy(self)
        object.__setattr__(other, "experts", experts)
        return other


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
    """Return homes in order, E/R on each rank, as Megatron and DeepSpeed put them, followed by empty slots for clones.

    Raises `BalanceError` if experts do not divide by ranks, or if there are more clones per rank than experts.
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
    """Return ``int64[layers, experts]``, the number of slots that hold each expert."""
    counts = np.zeros((placement.layers, experts), np.int64)
    layer, slot = np.nonzero(placement.experts != EMPTY)
    np.add.at(counts, (layer, placement.experts[layer, slot]), 1)
    return counts


def share_evenly(loads: Array, placement: Placement) -> Array:
    """Return the load of each slot, ``float64[layers, slots]``; the copies of an expert share its load evenly, as in EPLB."""
    held = np.maximum(placement.experts, 0)
    shares = np.take_along_axis(loads / np.maximum(count_copies(placement, loads.shape[1]), 1), held, 1)
    return np.where(placement.experts != EMPTY, shares, 0.0)


def sum_by_rank(slots: Array, cluster: Cluster) -> Array:
    """Return ``[layers, ranks]``: the sum over the slots of each rank, of ``[layers, slots]``."""
    sums: Array = np.add.reduceat(slots, cluster.rank_start[:-1], axis=-1)
    return sums


def measure_balancedness(rank_loads: Array) -> Array:
    """Return the mean over the largest rank load, along the last axis: 1 is perfect, and also the value without any load."""
    return divide_loads(rank_loads.mean(-1), rank_loads.max(-1))


def divide_loads(loads: Array, others: Array) -> Array:
    """Return ``loads`` over ``others``, and 1 where ``others`` are 0, since a layer without load is balanced."""
    ratio: Array = np.divide(loads, others, out=np.ones(np.shape(loads)), where=others > 0)
    return ratio
