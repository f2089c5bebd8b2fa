"""Slow, obvious counterparts of the fast algorithms: what tests compare them with."""

from itertools import combinations, permutations, product

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement, share_evenly, sum_by_rank


def bound_split(counts: Array, experts: Array, rank_of_slot: Array) -> int:
    """Return what the slowest rank has at least under any split of whole tokens, which some split reaches (Hall's theorem).

    Any set of ranks computes at least the tokens of the experts that have copies on none but its ranks. One layer:
    ``counts[experts]``, ``experts[slots]``, ``rank_of_slot[slots]``. Looks at all sets of ranks.
    """
    ranks = int(rank_of_slot.max()) + 1
    where = {expert: set(rank_of_slot[experts == expert].tolist()) for expert in range(len(counts))}
    least = 0
    for size in range(1, ranks + 1):
        for some in combinations(range(ranks), size):
            held = sum(int(counts[expert]) for expert, places in where.items() if places <= set(some))
            least = max(least, -(-held // size))
    return least


def solve_split(counts: Array, experts: Array, rank_of_slot: Array) -> float:
    """Return the slowest rank's load under the best split into shares of any size, by a linear program (HiGHS). One layer."""
    from scipy.optimize import linprog

    slots = np.flatnonzero(experts != EMPTY)
    ranks = int(rank_of_slot.max()) + 1
    of_expert = (experts[slots] == np.arange(len(counts))[:, None]).astype(float)
    of_rank = (rank_of_slot[slots] == np.arange(ranks)[:, None]).astype(float)
    # Variables: the tokens of each slot, and the slowest rank's load, which is made small.
    solved = linprog(
        c=[0.0] * len(slots) + [1.0],
        A_ub=np.hstack([of_rank, -np.ones((ranks, 1))]),
        b_ub=np.zeros(ranks),
        A_eq=np.hstack([of_expert, np.zeros((len(counts), 1))]),
        b_eq=counts,
    )
    return float(solved.fun)


def solve_staying(counts: Array, tokens: Array, experts: Array, of_source: Array, of_slot: Array) -> int:
    """Return the most tokens that any sharing of a split keeps in their place, by a linear program (HiGHS). One layer.

    ``counts[sources, experts]``, ``tokens[slots]``, ``experts[slots]``; ``of_source[sources]`` and ``of_slot[slots]``: the place,
    a rank or a node, of each.
    """
    from scipy.optimize import linprog

    sources, slots = len(counts), len(experts)
    of_expert = (experts[:, None] == np.arange(counts.shape[1])).astype(float)
    # Variables: what each source sends to each slot, at source * slots + slot; nothing to slots that are empty.
    solved = linprog(
        c=-(of_source[:, None] == of_slot).astype(float).ravel(),
        A_eq=np.vstack([np.kron(np.eye(sources), of_expert.T), np.kron(np.ones(sources), np.eye(slots))]),
        b_eq=np.concatenate([counts.ravel(), tokens]),
    )
    return round(float(-solved.fun))


def solve_traffic(weights: Array, home: Array, ranks_of_node: Array, pace: float) -> float:
    """Return the least load computed off its home node such that no node has more than ``pace`` per rank, by a linear program
    (HiGHS).

    One layer: ``weights[experts]``, ``home[experts]``; experts may be divided over nodes at will, so that no placement has less.
    """
    from scipy.optimize import linprog

    nodes, experts = len(ranks_of_node), len(weights)
    # Variables: the load of expert e on node n, at e * nodes + n.
    away = (home[:, None] != np.arange(nodes)).astype(float).ravel()
    solved = linprog(
        c=away,
        A_ub=np.tile(np.eye(nodes), experts),
        b_ub=pace * np.asarray(ranks_of_node),
        A_eq=np.kron(np.eye(experts), np.ones(nodes)),
        b_eq=weights,
    )
    return float(solved.fun)


def count_copies_slowly(weights: Array, slots: int, most: int) -> Array:
    """Return copies per expert: each slot left over goes to the one whose copies have the largest share, up to ``most``."""
    copies = np.ones(len(weights), np.int64)
    while copies.sum() < min(slots, len(weights) * most):
        copies[np.argmax(np.where(copies < most, weights / copies, -1))] += 1
    return copies


def place_best(loads: Array, cluster: Cluster) -> float:
    """Return the least load of the slowest rank over all placements, no expert twice on a rank. One layer, tiny."""
    held = [list(combinations(range(len(loads)), slots)) for slots in cluster.slots_per_rank]
    best = np.inf
    for choice in product(*held):
        experts = np.array([expert for some in choice for expert in some])
        if len(set(experts.tolist())) == len(loads):
            shares = share_evenly(loads[None], Placement(cluster, experts[None]))
            best = min(best, float(sum_by_rank(shares, cluster).max()))
    return best


def plan_clones_best(counts: Array, placement: Placement) -> int:
    """Return the least load of the slowest rank over all clones in the spare slots, tokens split exactly. One layer, tiny."""
    assert placement.homes is not None
    experts = placement.experts[0].copy()
    spare = np.setdiff1d(np.arange(len(experts)), placement.homes[0])
    best = int(counts.sum())
    for choice in product(range(EMPTY, len(counts)), repeat=len(spare)):
        experts[spare] = choice
        best = min(best, bound_split(counts, experts, placement.cluster.rank_of_slot))
    return best


def place_homes_best(loads: Array, held: Array) -> float:
    """Return the least load of the slowest rank, the mean over the forecasts, of all homes that keep their column. Tiny.

    ``loads[forecasts, experts]``; ``held[columns, ranks]``: the experts of a column, which change ranks among themselves.
    """
    best = np.inf
    for choice in product(*(permutations(column) for column in held.tolist())):
        best = min(best, float(loads[:, np.array(choice)].sum(1).max(1).mean()))
    return best
