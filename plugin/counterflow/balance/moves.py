"""Moves: the fewest transfers of weights from one placement to another, spread evenly over the ranks that send."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement
from counterflow.errors import BalanceError


@dataclass(frozen=True)
class Moves:
    """Transfers between ranks, ordered by layer and then by destination slot: ``int64[transfers]`` each.

    In ``round`` (from 0), the weights of ``expert`` in ``layer`` go from slot ``source`` of the old placement to ``slot``, on
    another rank. The transfers of a layer are ``layer_start[layer]`` to ``layer_start[layer + 1]``. A source has its content
    from before any transfer: a slot that receives before it has sent must keep the old weights until then.
    """

    cluster: Cluster
    layers: int
    layer: Array
    expert: Array
    slot: Array
    source: Array
    round: Array

    @property
    def count(self) -> int:
        """Number of transfers."""
        return len(self.layer)

    @property
    def rounds(self) -> int:
        """Number of rounds, 0 where nothing moves."""
        return int(self.round.max(initial=-1)) + 1

    @cached_property
    def layer_start(self) -> Array:
        """``int64[layers + 1]``: the first transfer of each layer, and the number of transfers."""
        return np.searchsorted(self.layer, np.arange(self.layers + 1))

    @cached_property
    def off_node(self) -> Array:
        """``bool[transfers]``: whether a transfer comes from another node."""
        nodes = self.cluster.node_of_slot
        away: Array = nodes[self.source] != nodes[self.slot]
        return away

    @cached_property
    def sends(self) -> Array:
        """``int64[ranks]``: transfers that each rank sends."""
        return np.bincount(self.cluster.rank_of_slot[self.source], minlength=self.cluster.ranks)

    @cached_property
    def receives(self) -> Array:
        """``int64[ranks]``: transfers that each rank receives."""
        return np.bincount(self.cluster.rank_of_slot[self.slot], minlength=self.cluster.ranks)


class Copies(NamedTuple):
    """Copies within a rank, ordered by layer and slot: ``int64[copies]`` each.

    In ``layer``, ``slot`` gets a copy of slot ``source`` of the same rank. ``arrives``, ``bool[copies]``, is True if a transfer
    fills ``source`` first, and False if ``source`` has its content from before any move.
    """

    layer: Array
    slot: Array
    source: Array
    arrives: Array


class _Held(NamedTuple):
    """The experts that ranks hold: each (layer, rank, expert) once, in order: a ``key`` and the first ``slot`` that has it."""

    key: Array
    slot: Array


def keep_slots(old: Placement, new: Placement) -> Placement:
    """Return ``new`` with the experts of each rank in the same slots as in ``old``, as far as possible.

    Experts change slots only within their layer and rank; home slots stay as they are. Raises `BalanceError` if the placements
    differ in their layers or cluster.
    """
    check_pair(old, new)
    experts = new.experts.copy()
    changed = old.experts != experts
    if new.homes is not None:
        np.put_along_axis(changed, new.homes, False, 1)
    starts = new.cluster.rank_start
    layers, slots = np.nonzero(changed)
    for layer, rank in sorted(set(zip(layers.tolist(), new.cluster.rank_of_slot[slots].tolist(), strict=True))):
        own = starts[rank] + np.flatnonzero(changed[layer, starts[rank] : starts[rank + 1]])
        experts[layer, own] = _keep_order(old.experts[layer, own].tolist(), experts[layer, own].tolist())
    return Placement(new.cluster, experts, new.homes)


def _keep_order(held: list[int], wanted: list[int]) -> list[int]:
    """Return ``wanted`` reordered: experts that are in ``held`` too take the same place as there, the others the free places."""
    rest = wanted.copy()
    kept: list[int | None] = []
    for expert in held:
        if expert in rest:
            rest.remove(expert)
            kept.append(expert)
        else:
            kept.append(None)
    return [rest.pop(0) if expert is None else expert for expert in kept]


def plan_moves(old: Placement, new: Placement, most_per_round: int | None = None) -> Moves:
    """Return the fewest transfers from ``old`` to ``new``: one for each expert of a layer that is new on a rank.

    An expert that a rank of ``old`` has in any slot is not sent to it (see `find_copies`). An expert for several slots of a rank
    is sent to the first. A source is on the receiver's node if that node has the expert. Under this condition, the rank with the
    most sends, over all layers, has as few as possible. With ``most_per_round``, no rank sends or receives more than that in one
    round, and there are as few rounds as possible; without it there is one. The result is the same on all machines.

    Raises `BalanceError` if the placements differ in their layers or cluster, if an expert of ``new`` is nowhere in ``old``, and
    for a ``most_per_round`` below 1.
    """
    check_pair(old, new)
    if most_per_round is not None and most_per_round < 1:
        raise BalanceError(f"{most_per_round} transfers per round; allowed: 1 or more, or None for one round")
    width = _count_experts(old, new)
    before, after = _list_held(old, width), _list_held(new, width)
    coming = ~np.isin(after.key, before.key, assume_unique=True)
    place, expert = np.divmod(after.key[coming], width)
    layer, rank = np.divmod(place, new.cluster.ranks)
    slot = after.slot[coming]
    source = _choose_sources(before, new.cluster, width, layer, rank, expert)
    rank_of_slot = new.cluster.rank_of_slot
    turn = arrange_rounds(rank_of_slot[source], rank_of_slot[slot], new.cluster.ranks, most_per_round)
    order = np.lexsort((slot, layer))
    return Moves(new.cluster, new.layers, layer[order], expert[order], slot[order], source[order], turn[order])


def find_copies(old: Placement, new: Placement) -> Copies:
    """Return the copies within ranks that complete the transfers of `plan_moves`.

    They fill slots of ``new`` whose expert is, or arrives, in another slot of the same rank: an expert that changes its slot
    (after `keep_slots`, only from or to a home slot), or one that a rank holds twice. Raises `BalanceError` if the placements
    differ in their layers or cluster.
    """
    check_pair(old, new)
    width = _count_experts(old, new)
    before, after = _list_held(old, width), _list_held(new, width)
    layer, slot = np.nonzero((new.experts != old.experts) & (new.experts != EMPTY))
    key = (layer * new.cluster.ranks + new.cluster.rank_of_slot[slot]) * width + new.experts[layer, slot]
    there = np.isin(key, before.key)
    source = np.empty_like(slot)
    source[there] = before.slot[np.searchsorted(before.key, key[there])]
    source[~there] = after.slot[np.searchsorted(after.key, key[~there])]
    copied = there | (source != slot)
    return Copies(layer[copied], slot[copied], source[copied], ~there[copied])


def check_pair(old: Placement, new: Placement) -> None:
    """Raise `BalanceError` if two placements have different clusters or numbers of layers."""
    if old.cluster != new.cluster:
        raise BalanceError(
            f"placements of {old.cluster.slots} slots on {old.cluster.ranks} ranks and {old.cluster.nodes} nodes, "
            f"and of {new.cluster.slots} on {new.cluster.ranks} and {new.cluster.nodes}; "
            "allowed: two of the same cluster, slot by slot and node by node"
        )
    if old.experts.shape != new.experts.shape:
        raise BalanceError(
            f"placements of {old.layers} and {new.layers} layers; allowed: as many in both; take the layers that are meant"
        )


def _count_experts(old: Placement, new: Placement) -> int:
    return int(max(old.experts.max(initial=0), new.experts.max(initial=0))) + 1


def _list_held(placement: Placement, width: int) -> _Held:
    layer, slot = np.nonzero(placement.experts != EMPTY)
    place = layer * placement.cluster.ranks + placement.cluster.rank_of_slot[slot]
    key, first = np.unique(place * width + placement.experts[layer, slot], return_index=True)
    return _Held(key, slot[first])


def _choose_sources(held: _Held, cluster: Cluster, width: int, layer: Array, rank: Array, expert: Array) -> Array:
    """Return ``int64[transfers]``, a slot of the old placement for each transfer.

    Transfers of one expert to one node have the same candidate sources; they are a group. A token split spreads the sends evenly:
    groups stand for experts, candidates for slots, transfers for tokens.
    """
    if not len(layer):
        return np.empty(0, np.int64)
    nodes = np.asarray(cluster.node_of_rank)
    group_key, group = np.unique((layer * width + expert) * cluster.nodes + nodes[rank], return_inverse=True)
    wanted = np.bincount(group)
    candidate_group, candidate_slot = _list_candidates(held, cluster, width, group_key)
    tokens = _level_senders(cluster, wanted, candidate_group, cluster.rank_of_slot[candidate_slot])
    source = np.empty(len(layer), np.int64)
    source[np.argsort(group, kind="stable")] = np.repeat(candidate_slot, tokens)
    return source


def _list_candidates(held: _Held, cluster: Cluster, width: int, group_key: Array) -> tuple[Array, Array]:
    """Return the group and the slot of each candidate, ordered by both: slots on the group's node, or all if it has none."""
    expert_key, node = np.divmod(group_key, cluster.nodes)
    place, expert = np.divmod(held.key, width)
    held_key = place // cluster.ranks * width + expert
    order = np.argsort(held_key, kind="stable")
    begin = np.searchsorted(held_key, expert_key, "left", order)
    count = np.searchsorted(held_key, expert_key, "right", order) - begin
    missing = np.flatnonzero(count == 0)
    if len(missing):
        layer, lost = divmod(int(expert_key[missing[0]]), width)
        raise BalanceError(
            f"layer {layer}: expert {lost} of the new placement is nowhere in the old one; allowed: experts that some slot holds"
        )
    group = np.repeat(np.arange(len(group_key)), count)
    within = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    slot = held.slot[order[begin[group] + within]]
    near = cluster.node_of_slot[slot] == node[group]
    kept = near | ~np.isin(group, group[near])
    return group[kept], slot[kept]


def _level_senders(cluster: Cluster, wanted: Array, group: Array, rank: Array) -> Array:
    """Return ``int64[candidates]``, the number of its group's transfers that each candidate sends."""
    from counterflow.balance.kernels.flow import split_layers  # loads a compiler

    by_rank = np.argsort(rank, kind="stable")
    rank_start = np.searchsorted(rank[by_rank], np.arange(cluster.ranks + 1))
    # Groups start at different candidates, so that few transfers have to be shifted.
    place_of = np.empty(len(rank), np.int64)
    place_of[by_rank] = np.arange(len(rank))
    begin = np.searchsorted(group, np.arange(len(wanted)))
    count = np.bincount(group)
    first = place_of[begin + np.arange(len(wanted)) % count]
    tokens = np.empty(len(rank), np.int64)
    tokens[by_rank] = split_layers(wanted[None], group[by_rank][None], rank[by_rank], rank_start, first[None])[0]
    return tokens


def arrange_rounds(sender: Array, receiver: Array, ranks: int, most: int | None) -> Array:
    """Return ``int64[transfers]``, a round for each transfer from rank ``sender`` to rank ``receiver``, ``int64[transfers]``.

    No rank sends or receives more than ``most`` in one round, and there are as few rounds as possible; one if ``most`` is None.
    """
    if most is None or not len(sender):
        return np.zeros(len(sender), np.int64)
    from counterflow.balance.kernels.rounds import colour_transfers  # loads a compiler

    colours = int(max(np.bincount(sender).max(), np.bincount(receiver).max()))
    # No rank has two transfers of one colour, and a round takes `most` colours.
    rounds: Array = colour_transfers(sender, receiver, ranks, colours) // most
    return rounds
