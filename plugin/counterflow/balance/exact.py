"""Exact plans: just-in-time clones for one micro-batch, from its own counts, where they save more time than they cost."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement
from counterflow.balance.split import check_split
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

# A layer's tokens, times 1024ths of tokens and of the mean, stay whole numbers of 64 bits.
MOST_TOKENS = 2**50
# Paces that are tried, in 1024ths above the mean.
PACES = np.array((0, 4, 12, 32, 96, 288))
# Clones cost next to nothing: fewer and nearer ones are preferred among plans that are nearly as fast.
FREE = (0, 0)


@dataclass(frozen=True)
class ExactPlan:
    """The placement of one micro-batch, and ``tokens``, ``int64[layers, slots]``, its split.

    ``near`` and ``far``, ``int64[layers]``: just-in-time clones whose home is on their own node and on another.
    """

    placement: Placement
    tokens: Array
    near: Array
    far: Array


def plan_exact(counts: Array, placement: Placement, shared: Array, prices: tuple[int, int] = FREE) -> ExactPlan:
    """Return which experts to clone in ``shared`` slots for this micro-batch, and how to split its tokens.

    ``counts``, ``int64[layers, experts]``, are the micro-batch's tokens. ``placement`` has homes, and clones that stay; its
    ``shared`` slots, ``bool[slots]``, are empty. ``prices`` are those of a clone from its own node and from another, in 1024ths
    of a token on the slowest rank, as `Costs.price_clones` returns them; clones are used only where the slowest rank saves more.
    By default they cost next to nothing, 1/65,536 and 1/2,048 of the mean rank's tokens: the slowest rank becomes about as fast
    as the planner can make it, with few clones and few from other nodes. All arithmetic is in integers, so every rank finds the
    same plan from the same counts. Raises `BalanceError` for counts that do not fit and for slots that cannot be shared.
    """
    from counterflow.balance.kernels.exact import choose_layers

    counts, homes = check_split(counts, placement, MOST_TOKENS), placement.homes
    if homes is None:
        raise BalanceError("a placement without homes; allowed: one with homes, which just-in-time clones are sent from")
    cluster = placement.cluster
    check_shared(shared, placement, homes)
    near_price, far_price = (take_whole(price, "price of a clone", 0, 2**36, BalanceError) for price in prices)
    experts, tokens, near, far = choose_layers(
        counts,
        placement.experts,
        homes,
        shared,
        cluster.rank_of_slot,
        cluster.rank_start,
        cluster.nodes_of_ranks,
        PACES,
        near_price,
        far_price,
    )
    return ExactPlan(placement.refill(experts), tokens, near, far)


def check_shared(shared: Array, placement: Placement, homes: Array) -> None:
    """Raise `BalanceError` unless ``shared`` says of each slot whether clones may fill it, and those slots are empty."""
    slots = placement.cluster.slots
    if shared.dtype != np.bool_ or shared.shape != (slots,):
        raise BalanceError(f"shared slots of type {shared.dtype} and shape {shared.shape}; allowed: bool, [{slots} slots]")
    filled = shared & (placement.experts != EMPTY)
    if filled.any():
        layer, slot = np.argwhere(filled)[0]
        kind = "the home of" if homes[layer, placement.experts[layer, slot]] == slot else "a clone of"
        raise BalanceError(
            f"layer {layer}: shared slot {slot} holds {kind} expert {placement.experts[layer, slot]}; allowed: empty slots"
        )


def add_shared_slots(placement: Placement, count: int) -> tuple[Placement, Array]:
    """Return ``placement`` with ``count`` empty slots more on each rank, after its own, and ``bool[slots]`` that marks them.

    Raises `BalanceError` for a count below 0.
    """
    take_whole(count, "shared slots per rank", 0, error=BalanceError)
    old = placement.cluster
    cluster = Cluster(tuple(size + count for size in old.slots_per_rank), old.node_of_rank)
    place = np.arange(old.slots) + count * old.rank_of_slot
    experts = np.full((placement.layers, cluster.slots), EMPTY)
    experts[:, place] = placement.experts
    shared = np.ones(cluster.slots, np.bool_)
    shared[place] = False
    return Placement(cluster, experts, None if placement.homes is None else place[placement.homes]), shared
