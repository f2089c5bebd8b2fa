"""Placement by nodes, compiled: the groups of a node stay on it, but for copies of hot experts that spill over where that pays.

A node whose groups bring more load than its ranks can take at the wanted pace sends some copies to nodes that have less: as
few as carry the excess, chosen such that they carry little more. Each node then packs what it holds. Last, ranks of different
nodes trade copies while the slowest gets faster and the traffic stays within bounds.
"""

import heapq
from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels.flow import holds
from counterflow.balance.kernels.packing import count_copies, count_held, pack_and_trade, place_layer, sum_ranks
from counterflow.compiling import compile_fast

# A node is never packed perfectly: shares of the wanted pace that are tried for the nodes, the slowest first.
TIGHTNESS = (1.0, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95)
# Traffic allowed, over the least that brings every node to the wanted pace.
SLACK = 1.15
# Spilled copies beyond those that carry the excess: so many numbers are tried, from none.
EXTRA = 4
# Trades across nodes, and the pairs of slots that all of them together may look at: with thousands of slots per rank none is
# worth its time, and none is needed.
TRADES = 400
PAIRS = 40_000_000


class Nodes(NamedTuple):
    """Slots by node: ``slots[node_start[n]:node_start[n + 1]]`` are those of node n, rank by rank.

    ``rank_start[ranks + 1]`` first slots of ranks, ``ranks[rank_from[n]:rank_from[n + 1]]`` the ranks of node n,
    ``of_rank[rank]`` its node.
    """

    slots: Array
    node_start: Array
    rank_start: Array
    ranks: Array
    rank_from: Array
    of_rank: Array


@compile_fast
def place_within(weights: Array, home: Array, nodes: Nodes) -> Array:
    """Return the expert of each slot where every copy stays on its expert's node, ``home[experts]``."""
    experts = np.full(nodes.slots.shape[0], -1)
    for node in range(nodes.node_start.shape[0] - 1):
        own = np.flatnonzero(home == node)
        if own.shape[0] > 0:
            held, _ = place_layer(weights[own], start_ranks(nodes, node))
            put_on_node(experts, nodes, node, own, held)
    return experts


@compile_fast
def start_ranks(nodes: Nodes, node: int) -> Array:
    """Return the first slots of a node's ranks, and the number of its slots, counted from its first."""
    ranks = nodes.ranks[nodes.rank_from[node] : nodes.rank_from[node + 1]]
    start = np.zeros(ranks.shape[0] + 1, np.int64)
    for place, rank in enumerate(ranks):
        start[place + 1] = start[place] + nodes.rank_start[rank + 1] - nodes.rank_start[rank]
    return start


@compile_fast
def put_on_node(experts: Array, nodes: Nodes, node: int, names: Array, held: Array) -> None:
    """Write what a node's slots hold, given as places in ``names``, into the slots of all."""
    for place, slot in enumerate(nodes.slots[nodes.node_start[node] : nodes.node_start[node + 1]]):
        experts[slot] = names[held[place]] if held[place] >= 0 else -1


@compile_fast
def place_spilling(weights: Array, home: Array, nodes: Nodes, pace: float) -> Array:
    """Return the expert of each slot, where hot experts may have copies on other nodes than ``home[experts]``.

    ``pace``: the load that the slowest rank shall have at most; what comes nearest is returned where none is found.
    """
    best = place_within(weights, home, nodes)
    best_slowest = sum_ranks(weights / count_held(best, weights.shape[0]), best, nodes.rank_start).max()
    if best_slowest <= pace:
        return best
    node_loads = np.zeros(nodes.rank_from.shape[0] - 1)
    for expert, node in enumerate(home):
        node_loads[node] += weights[expert]
    width = nodes.rank_from[1:] - nodes.rank_from[:-1]
    allowed = SLACK * np.maximum(0.0, node_loads - pace * width).sum()
    for attempt in range(2 * EXTRA * len(TIGHTNESS)):
        tightness, extra = TIGHTNESS[attempt % len(TIGHTNESS)], attempt // len(TIGHTNESS) % EXTRA
        narrow = attempt < EXTRA * len(TIGHTNESS)
        copies, excess = count_spilling(weights, home, nodes, node_loads, pace, tightness, extra, narrow)
        counts = spread_copies(weights, copies, excess, home, nodes)
        experts = pack_nodes(weights / copies, counts, nodes)
        held = count_held(experts, weights.shape[0])
        if held.min() == 0:
            continue
        if (experts < 0).any():
            # Some copies found no place: their own nodes are full, or have one on each rank.
            fill_at_home(experts, weights / held, home, nodes)
            held = count_held(experts, weights.shape[0])
        load = sum_ranks(weights / held, experts, nodes.rank_start)
        trade_across(weights / held, experts, load, home, nodes, pace, allowed)
        if load.max() < best_slowest:
            best, best_slowest = experts, load.max()
        if best_slowest <= pace:
            return best
    return best


@compile_fast
def fill_at_home(experts: Array, sizes: Array, home: Array, nodes: Nodes) -> None:
    """Put into each empty slot the largest expert of its node that its rank lacks."""
    order = np.argsort(-sizes, kind="mergesort")
    for rank, node in enumerate(nodes.of_rank):
        for slot in range(nodes.rank_start[rank], nodes.rank_start[rank + 1]):
            if experts[slot] < 0:
                for expert in order:
                    if home[expert] == node and not holds(experts, nodes.rank_start, rank, expert):
                        experts[slot] = expert
                        break


@compile_fast
def count_spilling(
    weights: Array, home: Array, nodes: Nodes, node_loads: Array, pace: float, tightness: float, extra: int, narrow: bool
) -> tuple[Array, Array]:
    """Return the copies of each expert, and the excess of each node: its load above what its ranks take at a pace.

    The pace is ``tightness`` of ``pace``. A node with an excess gets copies for all its slots, and as many more as it takes for
    the largest of them to carry the excess and for none to be more than a rank can take, and ``extra`` ones. The others share
    the rest of the slots; with ``narrow`` none of their experts gets more copies than its node has ranks.
    """
    copies = np.ones(weights.shape[0], np.int64)
    slots = nodes.node_start[1:] - nodes.node_start[:-1]
    excess = np.maximum(0.0, node_loads - pace * tightness * (nodes.rank_from[1:] - nodes.rank_from[:-1]))
    # Slots that the others can spare: those they do not need for their own, in copies that a rank can take.
    spare = slots[excess == 0].sum()
    for expert, node in enumerate(home):
        if excess[node] == 0:
            spare -= max(1, int(np.ceil(weights[expert] / pace)))
    limit = slots.copy()
    for node in np.argsort(-excess, kind="mergesort"):
        if excess[node] == 0 or spare <= 0:
            continue
        own = np.flatnonzero(home == node)
        ranks = nodes.of_rank.shape[0]
        # With more copies, those that leave carry more and none is larger, so halving finds the fewest.
        low, high = slots[node] + 1, slots[node] + spare
        while low < high:
            middle = (low + high) // 2
            if carries_excess(weights[own], slots[node], middle, ranks, excess[node], pace * tightness):
                high = middle
            else:
                low = middle + 1
        limit[node] = min(low + extra, slots[node] + spare)
        spare -= limit[node] - slots[node]
        copies[own] = count_copies(weights[own], limit[node], ranks)
    width = nodes.rank_from[1:] - nodes.rank_from[:-1]
    most = width[home] if narrow else np.full(home.shape[0], nodes.of_rank.shape[0])
    share_rest(weights, home, copies, excess, slots, slots.sum() - limit[excess > 0].sum(), most)
    return copies, excess


@compile_fast
def carries_excess(weights: Array, slots: int, limit: int, most: int, excess: float, largest: float) -> bool:
    """Tell whether, with ``limit`` copies, the largest carry ``excess`` where ``slots`` stay, and none is above ``largest``."""
    copies = count_copies(weights, limit, most)
    shares = np.sort(np.repeat(weights / copies, copies))
    return bool(shares[slots - limit :].sum() >= excess and shares[-1] <= largest)


@compile_fast
def share_rest(weights: Array, home: Array, copies: Array, excess: Array, slots: Array, total: int, most: Array) -> None:
    """Give the nodes without an excess ``total`` copies, up to their slots, always one of the largest share.

    An expert gets up to ``most[expert]``.
    """
    held = np.zeros(slots.shape[0], np.int64)
    for node in home:
        held[node] += 1
    left = total - held[excess == 0].sum()
    order = [(-weights[expert], expert) for expert in range(weights.shape[0]) if excess[home[expert]] == 0]
    heapq.heapify(order)
    while left > 0 and len(order) > 0:
        _, expert = heapq.heappop(order)
        if held[home[expert]] < slots[home[expert]] and copies[expert] < most[expert]:
            copies[expert] += 1
            held[home[expert]] += 1
            left -= 1
            heapq.heappush(order, (-weights[expert] / copies[expert], expert))


@compile_fast
def spread_copies(weights: Array, copies: Array, excess: Array, home: Array, nodes: Nodes) -> Array:
    """Return how many copies of each expert each node holds, ``int64[nodes, experts]``."""
    total = excess.shape[0]
    sizes = weights / copies
    slots = nodes.node_start[1:] - nodes.node_start[:-1]
    width = nodes.rank_from[1:] - nodes.rank_from[:-1]
    counts = np.zeros((total, weights.shape[0]), np.int64)
    sent = np.zeros(weights.shape[0], np.int64)
    for node in range(total):
        own = np.flatnonzero(home == node)
        counts[node, own] = copies[own]
        surplus = copies[own].sum() - slots[node]
        carried = excess[node]
        # More copies than the node has ranks leave in any case.
        for expert in own:
            beyond = max(0, copies[expert] - width[node])
            counts[node, expert] -= beyond
            sent[expert] += beyond
            surplus -= beyond
            carried -= beyond * sizes[expert]
        if surplus > 0:
            choose_sent(sizes, own, counts[node], sent, surplus, max(0.0, carried))
    load, held = np.zeros(total), np.zeros(total, np.int64)
    for node in range(total):
        load[node], held[node] = (counts[node] * sizes).sum(), counts[node].sum()
    for expert in np.argsort(-sizes, kind="mergesort"):
        for _ in range(sent[expert]):
            to = -1
            for node in range(total):
                fits = held[node] < slots[node] and counts[node, expert] < width[node]
                if fits and (to < 0 or load[node] / width[node] < load[to] / width[to]):
                    to = node
            if to >= 0:
                counts[to, expert] += 1
                held[to] += 1
                load[to] += sizes[expert]
    return counts


@compile_fast
def choose_sent(sizes: Array, own: Array, counts: Array, sent: Array, surplus: int, excess: float) -> None:
    """Move ``surplus`` copies of the experts ``own`` from ``counts`` to ``sent``: such as carry ``excess`` and little more.

    Begins with the run of neighbours in size that misses it least, then exchanges single copies.
    """
    names = np.repeat(own, counts[own])
    names = names[np.argsort(sizes[names], kind="mergesort")]
    share = sizes[names]
    first, missed = 0, np.inf
    sums = np.cumsum(share)
    for start in range(names.shape[0] - surplus + 1):
        miss = rate_miss(sums[start + surplus - 1] - (sums[start - 1] if start > 0 else 0.0), excess)
        if miss < missed:
            first, missed = start, miss
    chosen = np.zeros(names.shape[0], np.bool_)
    chosen[first : first + surplus] = True
    carried = share[chosen].sum()
    improved = True
    while improved:
        improved = False
        out, into = -1, -1
        others = np.flatnonzero(~chosen)
        shares = share[others]
        for inside in np.flatnonzero(chosen):
            # Of the others, which are in order, only the two around what is missing can be best.
            place = np.searchsorted(shares, excess - carried + share[inside])
            for near in range(max(0, place - 1), min(place + 1, shares.shape[0])):
                miss = rate_miss(carried - share[inside] + shares[near], excess)
                if miss < missed - 1e-12 * (excess + share[-1]):
                    missed, out, into, improved = miss, int(inside), int(others[near]), True
        if improved:
            chosen[out], chosen[into] = False, True
            carried += share[into] - share[out]
    for name in names[chosen]:
        counts[name] -= 1
        sent[name] += 1


@compile_fast
def rate_miss(carried: float, excess: float) -> float:
    """Return how far off a load is: too little counts more than too much."""
    return carried - excess if carried >= excess else 3 * (excess - carried)


@compile_fast
def pack_nodes(sizes: Array, counts: Array, nodes: Nodes) -> Array:
    """Return the expert of each slot, where each node packs the copies ``counts[nodes, experts]`` that it has."""
    experts = np.full(nodes.slots.shape[0], -1)
    for node in range(counts.shape[0]):
        names = np.flatnonzero(counts[node])
        held, _ = pack_and_trade(sizes[names], counts[node, names], start_ranks(nodes, node))
        put_on_node(experts, nodes, node, names, held)
    return experts


@compile_fast
def trade_across(sizes: Array, experts: Array, load: Array, home: Array, nodes: Nodes, pace: float, allowed: float) -> None:
    """Let the slowest rank trade copies with ranks of all nodes until it keeps pace, with off-node load up to ``allowed``."""
    away = 0.0
    for rank, node in enumerate(nodes.of_rank):
        for slot in range(nodes.rank_start[rank], nodes.rank_start[rank + 1]):
            if experts[slot] >= 0 and home[experts[slot]] != node:
                away += sizes[experts[slot]]
    widest = (nodes.rank_start[1:] - nodes.rank_start[:-1]).max()
    for _ in range(min(TRADES, PAIRS // (widest * experts.shape[0]))):
        slow = int(np.argmax(load))
        if load[slow] <= pace:
            return
        given, taken, other = find_trade(sizes, experts, load, home, nodes, slow, pace, allowed - away)
        if given < 0:
            return
        less = sizes[experts[given]] - sizes[experts[taken]]
        away += count_traffic(sizes, experts, home, given, taken, nodes.of_rank[slow], nodes.of_rank[other])
        experts[given], experts[taken] = experts[taken], experts[given]
        load[slow] -= less
        load[other] += less


@compile_fast
def find_trade(
    sizes: Array, experts: Array, load: Array, home: Array, nodes: Nodes, slow: int, pace: float, allowed: float
) -> tuple[int, int, int]:
    """Return two slots to swap, of rank ``slow`` and of another, and that rank; -1 where no swap helps.

    The best leaves the slower of both fastest, down to ``pace``; off-node load counts a quarter, and may not grow by more
    than ``allowed``.
    """
    best, given, taken, partner = np.inf, -1, -1, -1
    for rank in range(load.shape[0]):
        if load[rank] >= load[slow]:
            continue
        for slot in range(nodes.rank_start[slow], nodes.rank_start[slow + 1]):
            for other in range(nodes.rank_start[rank], nodes.rank_start[rank + 1]):
                less = sizes[experts[slot]] - sizes[experts[other]]
                after = max(load[slow] - less, load[rank] + less)
                if less <= 0 or after >= load[slow] * (1 - 1e-9):
                    continue
                traffic = count_traffic(sizes, experts, home, slot, other, nodes.of_rank[slow], nodes.of_rank[rank])
                value = max(after, pace) + traffic / 4
                if value >= best or traffic > max(allowed, 0.0):
                    continue
                if holds(experts, nodes.rank_start, rank, experts[slot]) or holds(
                    experts, nodes.rank_start, slow, experts[other]
                ):
                    continue
                best, given, taken, partner = value, slot, other, rank
    return given, taken, partner


@compile_fast
def count_traffic(sizes: Array, experts: Array, home: Array, slot: int, other: int, node: int, other_node: int) -> float:
    """Return the off-node load that a swap of two slots, on ``node`` and ``other_node``, adds."""
    added = 0.0
    if node != other_node:
        expert, taken = experts[slot], experts[other]
        added += sizes[expert] * (int(home[expert] != other_node) - int(home[expert] != node))
        added += sizes[taken] * (int(home[taken] != node) - int(home[taken] != other_node))
    return added
