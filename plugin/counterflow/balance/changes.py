"""From one free placement to the next: under which names its ranks cost least to reach, and whether it is worth that."""

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.clones import HORIZON, MOVE_PRICE
from counterflow.balance.moves import check_pair, keep_slots, plan_moves
from counterflow.balance.placement import EMPTY, Placement, share_evenly, sum_by_rank
from counterflow.errors import BalanceError


def match_ranks(old: Placement, new: Placement) -> Placement:
    """Return ``new`` with its ranks renamed such that as many experts as can be are already where they shall lie.

    Ranks of one node with as many slots stand for each other, layer by layer, so that loads and off-node traffic stay the
    same. Solved exactly, as an assignment problem. Then `keep_slots`. Raises `BalanceError` for placements with fixed homes,
    or of two clusters.
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
    """Return ``int64[ranks, ranks]``: how many experts of rank i in ``ours[ranks, slots]`` rank j has in ``theirs``."""
    width = int(max(ours.max(), theirs.max())) + 1
    holds = [np.zeros((len(ours), width), np.int64) for _ in range(2)]
    for held, slots in zip(holds, (ours, theirs), strict=True):
        rank, place = np.nonzero(slots != EMPTY)
        held[rank, slots[rank, place]] = 1
    return np.asarray(holds[0] @ holds[1].T)


def take_if_worth(
    old: Placement, new: Placement, loads: Array, horizon: int = HORIZON, move_price: float = MOVE_PRICE
) -> Placement:
    """Return, layer by layer, what costs less over the next ``horizon`` micro-batches: ``old``, or a move to ``new``.

    ``loads``: ``[layers, experts]``, what is expected, copies sharing it evenly. Receiving one expert costs a rank
    ``move_price`` of the time that the mean rank takes for a micro-batch; the rank that receives most counts. Raises
    `BalanceError` as `match_ranks`, which renames ranks of ``new`` first.
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
