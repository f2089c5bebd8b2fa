"""Sharing a layer's split among the sources of its tokens, compiled.

The split says how many tokens of an expert each of its slots computes; the sources have as many in all. So each expert is a
transportation problem of its own: what every source sends to every slot. Tokens are given out in three tiers, first within
ranks, then within nodes, then to whoever has room. A place, a rank or a node, can keep the smaller of what its sources have and
what its slots take. The first tier keeps as much on every rank. It takes as many tokens from a node's sources as from its
slots, so what the second adds makes up that smaller number for every node: no sharing keeps more on ranks, none more on nodes.
"""

from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels import LARGEST_SUM
from counterflow.balance.kernels.flow import Links, link_slots, split_layer
from counterflow.compiling import compile_fast


class Sources(NamedTuple):
    """The sources of tokens, node by node, and rank by rank in a node.

    ``order[sources]``: their numbers in that order. ``within[tier, rank]``: from where to where in it the sources stand that are
    near a slot of ``rank``, those on the rank (tier 0), on its node (1), all (2).
    """

    order: Array
    within: Array


@compile_fast
def share_layer(
    counts: Array,
    experts: Array,
    homes: Array,
    rank_of_slot: Array,
    rank_start: Array,
    node_of_slot: Array,
    rank_of_source: Array,
) -> tuple[bool, Array]:
    """Return whether ``counts[sources, experts]`` and ``rank_of_source[sources]`` are within bounds, and if so their
    ``shares[sources, slots]``.
    """
    shares = np.zeros((counts.shape[0], experts.shape[0]), np.int64)
    totals = np.zeros(counts.shape[1], np.int64)
    if not sum_sources(counts, totals) or not are_within(rank_of_source, rank_start.shape[0] - 1):
        return False, shares
    links = link_slots(experts, rank_of_slot, rank_start, homes)
    tokens = np.zeros(experts.shape[0], np.int64)
    if links.expert_start[-1] > homes.shape[0]:
        split_layer(totals, links, tokens, np.empty(rank_start.shape[0] - 1, np.int64))
    else:
        tokens[homes] = totals
    stay: Array = np.flatnonzero(tokens[homes] == totals)
    for source in range(counts.shape[0]):
        for expert in stay:
            shares[source, homes[expert]] = counts[source, expert]
    if stay.shape[0] < homes.shape[0]:
        sources = order_sources(rank_of_source, rank_start, node_of_slot)
        rest = np.empty(counts.shape[0], np.int64)
        for expert, home in enumerate(homes):
            if tokens[home] < totals[expert]:
                rest[:] = counts[sources.order, expert]
                share_expert(expert, links, sources, rest, tokens, shares)
    return True, shares


@compile_fast
def sum_sources(counts: Array, totals: Array) -> bool:
    """Add each expert's counts to ``totals[experts]``; return whether none is negative, or so large that sums could overflow."""
    least, most = 0, 0
    for source in range(counts.shape[0]):
        for expert in range(counts.shape[1]):
            count = counts[source, expert]
            totals[expert] += count
            least = min(least, count)
            most = max(most, count)
    return least >= 0 and float(most) * counts.size <= LARGEST_SUM


@compile_fast
def are_within(numbers: Array, limit: int) -> bool:
    """Tell whether all ``numbers`` are from 0 to below ``limit``."""
    for number in numbers:  # noqa: SIM110, all() of a generator does not compile
        if number < 0 or number >= limit:
            return False
    return True


@compile_fast
def order_sources(rank_of_source: Array, rank_start: Array, node_of_slot: Array) -> Sources:
    """Return the sources by node, rank and number."""
    ranks, count = rank_start.shape[0] - 1, rank_of_source.shape[0]
    node_of_rank = node_of_slot[rank_start[:-1]]
    order = np.argsort(node_of_rank[rank_of_source] * ranks + rank_of_source, kind="mergesort")
    on_rank = np.zeros((ranks, 2), np.int64)
    on_node = np.zeros((node_of_rank.max() + 1, 2), np.int64)
    for place in range(count - 1, -1, -1):
        rank = rank_of_source[order[place]]
        for span in (on_rank[rank], on_node[node_of_rank[rank]]):
            span[0] = place
            span[1] = max(span[1], place + 1)
    within = np.empty((3, ranks, 2), np.int64)
    within[0] = on_rank
    within[1] = on_node[node_of_rank]
    within[2, :, 0] = 0
    within[2, :, 1] = count
    return Sources(order, within)


@compile_fast
def share_expert(expert: int, links: Links, sources: Sources, rest: Array, tokens: Array, shares: Array) -> None:
    """Fill ``shares`` of an expert's slots from ``rest``, its counts in the sources' order; uses ``rest`` and ``tokens`` up."""
    for tier in range(3):
        for copy in range(links.expert_start[expert], links.expert_start[expert + 1]):
            slot = links.copies[copy]
            begin, end = sources.within[tier, links.rank_of_slot[slot]]
            for place in range(begin, end):
                if tokens[slot] == 0:
                    break
                amount = min(rest[place], tokens[slot])
                rest[place] -= amount
                tokens[slot] -= amount
                shares[sources.order[place], slot] += amount
