"""Change from one free placement to the next: rename ranks so that few experts move, and move only if that pays."""

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.clones import HORIZON, MOVE_PRICE
from counterflow.balance.moves import check_pair, keep_slots, plan_moves
from counterflow.balance.placement import EMPTY, Placement, share_evenly, sum_by_rank
from counterflow.errors import BalanceError


def match_ranks(old: Placement, new: Placement) -> Placement:
    """Return ``new`` with its ranks renamed such that the fewest experts have to move from ``old``.

    Only ranks of the same node with equally many slots are exchanged, layer by layer, so loads and off-node traffic do not
    change. This is an assignment problem and is solved exactly. `keep_slots` then orders the slots of each rank. Raises
    `BalanceError` if a placement has fixed homes, or if the two have different clusters.
    """
    from scipy.optimize import linear_sum_assignment

    if old.homes is not None or new.homes is not None:
        raise BalanceError("a placement with fixed homes; allowed: free placements, homes cannot change their rank")
    check_pair(old, new)
    cluster = new.cluster
    alike: dict[tuple[int, int], list[int]] = {}
    for rank, kind in enumerate(zip(cluster.node_of_rank, cluster.slots_per_rank, strict=True)):
        alike.setdefault(kind, []).append(rank)
    experts = new.experts.copy()
    for ranks in alike.values():
        slots = cluster.rank_start[ranks][:, None] + np.arange(cluster.slots_per_rank[ranks[0]])
        for layer, held in enumerate(new.experts):
            ours, theirs = held[slots], old.experts[layer, slots]
            common = count_common(ours, theirs)
            which, where = linear_sum_assignment(common, maximize=True)
            experts[layer, slots[where]] = ours[which]
    return keep_slots(old, Placement(cluster, experts))


def count_common(ours: Array, theirs: Array) -> Array:
    """Return ``int64[ranks, ranks]``: how many experts rank i of ``ours[ranks, slots]`` shares with rank j of ``theirs``."""
    width = int(max(ours.max(), theirs.max())) + 1
    holds = [np.zeros((len(ours), width), np.int64) for _ in range(2)]
    for held, slots in zip(holds, (ours, theirs), strict=True):
        rank, place = np.nonzero(slots != EMPTY)
        held[rank, slots[rank, place]] = 1
    return np.asarray(holds[0] @ holds[1].T)


def take_if_worth(
    old: Placement, new: Placement, loads: Array, horizon: int = HORIZON, move_price: float = MOVE_PRICE
) -> Placement:
    """Return, for each layer, ``old`` or ``new``, whichever costs less over the next ``horizon`` micro-batches.

    ``loads[layers, experts]`` are the expected loads; the copies of an expert share its load evenly. The price of a move is
    ``move_price`` times the mean rank's time for a micro-batch, for each expert that the busiest receiver receives. The ranks
    of ``new`` are renamed by `match_ranks` first. Raises `BalanceError` as that does.
    """
    if horizon < 1 or not 0 <= move_price < np.inf:
        raise BalanceError(f"horizon {horizon}, move price {move_price}; allowed: a horizon of 1 or more, a price of 0 or more")
    new = match_ranks(old, new)
    cluster = new.cluster
    moves = plan_moves(old, new)
    received = np.zeros((new.layers, cluster.ranks), np.int64)
    np.add.at(received, (moves.layer, cluster.rank_of_slot[moves.slot]), 1)
    mean = loads.sum(1) / cluster.ranks
    slowest = [sum_by_rank(share_evenly(loads, placement), cluster).max(1) for placement in (old, new)]
    worth = horizon * (slowest[0] - slowest[1]) > move_price * mean * received.max(1)
    return Placement(cluster, np.where(worth[:, None], new.experts, old.experts))
