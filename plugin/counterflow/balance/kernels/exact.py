"""Just-in-time clones of one layer and micro-batch, compiled: which clones pay, from the counts of the micro-batch itself.

A pace is the most tokens that a rank may have. For each of several paces the clones are found that bring all ranks down to it,
in two ways. *Settling* is for loads that lie far apart: like debts among R people, R - 1 transfers level R ranks, if every
transfer fills the rank that lacks most, even where its donor then lacks something and is filled later. So one free slot a rank
is enough where experts are large enough. *Mending* is for loads that are nearly level, or that clones which are there already
can nearly level: one clone at a time for the slowest rank, and after each the tokens flow again through all copies there are.
Nodes settle and mend on their own first. Clones from other nodes are for what a node cannot level alone: the tokens that it has
more than its ranks can take at the pace. Of all these plans, and of doing nothing, the cheapest is taken. Only integers are
compared, so all machines find the same plan.
"""

from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels.flow import (
    Links,
    find_paths,
    holds,
    insert_copy,
    level_ranks,
    link_slots,
    push_tokens,
    split_layer,
)
from counterflow.compiling import compile_fast

# Prices and paces are whole multiples of a 1024th: of a token, of the mean rank's tokens.
UNIT = 1024
# What tokens from another node count beside those from the own one, which count more by as much as a clone from afar is dearer.
FAR_WEIGHT, MOST_WEIGHT = 16, 1024
# Where clones are free, one costs such a part of the mean rank's tokens, one from another node such a part.
NEAR_PART, FAR_PART = 2**16, 2**14
# A slowest rank so little above the mean, in 1024ths, is fast enough: where clones are free, none comes from another node for
# more, and nothing is mended for more.
ENOUGH = 5
# Where nodes cannot settle otherwise, ranks take from anywhere, at first with so much favour for their own node.
FAVOURS = (2, 0)
# So many slots and ranks are visited at most to find out which clones can be done without.
DROP_VISITS = 2000


class Ranks(NamedTuple):
    """Where a layer's slots and homes are.

    ``is_home[slots]`` marks the homes of experts, ``is_shared[slots]`` the slots that just-in-time clones may fill.
    ``by_node[ranks]`` lists the ranks node by node; those of node n begin at ``node_start[n]`` and end at ``node_start[n + 1]``.
    Where all are taken for one node, ``machine_of_rank[ranks]`` is the node that they are on, and a donor on the taker's machine
    counts more by ``favour``, in eighths of what a full rank counts.
    """

    rank_of_slot: Array
    rank_start: Array
    node_of_rank: Array
    by_node: Array
    node_start: Array
    homes: Array
    is_home: Array
    is_shared: Array
    machine_of_rank: Array
    favour: int


class Trials(NamedTuple):
    """The cheapest plan so far, ``best[slots]``, its cost, ``least``, and the tokens of its slowest rank.

    The cost is the sum of these tokens and the prices of clones, in 1024ths.
    """

    best: Array
    least: int
    slowest: int
    near_price: int
    far_price: int


@compile_fast
def choose_layers(
    counts: Array,
    experts: Array,
    homes: Array,
    is_shared: Array,
    rank_of_slot: Array,
    rank_start: Array,
    node_of_rank: Array,
    paces: Array,
    near_price: int,
    far_price: int,
) -> tuple[Array, Array, Array, Array]:
    """Return the experts and the tokens of the slots, ``[layers, slots]`` each, after `choose_clones` for every layer.

    And the clones in shared slots, ``[layers]``, whose home is on their own node, and those whose home is on another.
    """
    chosen, tokens = experts.copy(), np.empty(experts.shape, np.int64)
    load = np.empty(node_of_rank.shape[0], np.int64)
    near, far = np.zeros(counts.shape[0], np.int64), np.zeros(counts.shape[0], np.int64)
    by_node = np.argsort(node_of_rank, kind="mergesort")
    node_start = np.zeros(node_of_rank.max() + 2, np.int64)
    for node in node_of_rank:
        node_start[node + 1 :] += 1
    for layer in range(counts.shape[0]):
        is_home = np.zeros(experts.shape[1], np.bool_)
        is_home[homes[layer]] = True
        ranks = Ranks(
            rank_of_slot, rank_start, node_of_rank, by_node, node_start, homes[layer], is_home, is_shared, node_of_rank, 0
        )
        choose_clones(ranks, counts[layer], chosen[layer], paces, near_price, far_price, tokens[layer], load)
        near[layer], far[layer] = count_clones(ranks, chosen[layer])
    return chosen, tokens, near, far


@compile_fast
def choose_clones(
    ranks: Ranks, counts: Array, experts: Array, paces: Array, near_price: int, far_price: int, tokens: Array, load: Array
) -> None:
    """Fill shared slots of ``experts[slots]`` where that pays; fill ``tokens[slots]`` and ``load[ranks]`` with the split.

    ``counts[experts]`` are the layer's tokens. ``paces``, lowest first, are 1024ths above the mean. A clone costs ``near_price``,
    or ``far_price`` from another node, in 1024ths of a token on the slowest rank; a ``far_price`` of 0 says that clones are free.
    """
    links = link_slots(experts, ranks.rank_of_slot, ranks.rank_start, ranks.homes)
    slowest = split_layer(counts, links, tokens, load)
    total, size, is_free = load.sum(), load.shape[0], far_price == 0
    if is_free:
        # No more than it takes to prefer fewer and nearer clones among plans that are nearly as fast.
        near_price, far_price = max(1, total * UNIT // size // NEAR_PART), max(1, total * UNIT // size // FAR_PART)
    floors = -(-total * (UNIT + paces) // (UNIT * size))
    if slowest * UNIT <= floors[0] * UNIT + near_price:
        return
    enough = -(-total * (UNIT + ENOUGH) // (UNIT * size))
    trials = Trials(experts.copy(), slowest * UNIT, slowest, near_price, far_price)
    alone = find_lowest_pace(ranks, load)
    only = np.array([enough])
    if alone > floors[0]:
        # Paces that no clone from another node is needed for.
        trials = settle_at_paces(ranks, ranks, counts, -(-alone * (UNIT + paces) // UNIT), experts, tokens, load, trials)
        if is_free and trials.slowest > enough:
            trials = settle_at_paces(ranks, ranks, counts, only, experts, tokens, load, trials)
    if not is_free or trials.slowest > enough:
        trials = settle_at_paces(ranks, ranks, counts, floors[:1] if is_free else floors, experts, tokens, load, trials)
    for favour in FAVOURS:
        if trials.slowest > enough and alone > floors[0]:
            merged, lowest = merge_nodes(ranks, favour), floors[:1] if favour > 0 else only
            trials = settle_at_paces(ranks, merged, counts, lowest, experts, tokens, load, trials)
    if trials.slowest > enough:
        trials = mend_ranks(ranks, counts, floors, experts.copy(), tokens, load, trials)
    experts[:] = trials.best
    split_layer(counts, link_slots(experts, ranks.rank_of_slot, ranks.rank_start, ranks.homes), tokens, load)
    drop_clones(ranks, counts, near_price, far_price, experts, tokens, load)


@compile_fast
def find_lowest_pace(ranks: Ranks, load: Array) -> int:
    """Return the fewest tokens that the slowest rank can have if no token crosses nodes but to the clones that are there."""
    lowest = 0
    for node in range(ranks.node_start.shape[0] - 1):
        begin, end = ranks.node_start[node], ranks.node_start[node + 1]
        held = 0
        for place in range(begin, end):
            held += load[ranks.by_node[place]]
        lowest = max(lowest, -(-held // (end - begin)))
    return lowest


@compile_fast
def settle_at_paces(
    ranks: Ranks, grouped: Ranks, counts: Array, floors: Array, experts: Array, tokens: Array, load: Array, trials: Trials
) -> Trials:
    """Settle at each of the paces ``floors``, lowest first, while that may be cheaper; return the trials then.

    Ranks settle as ``grouped``, clones are priced by ``ranks``.
    """
    for pace in floors:
        if pace * UNIT + trials.near_price >= trials.least:
            break
        tried = experts.copy()
        settle_ranks(grouped, counts, pace, tried, tokens, load)
        if load.max() > pace:
            level_ranks(link_slots(tried, ranks.rank_of_slot, ranks.rank_start, ranks.homes), tokens, load)
        trials = take_cheaper(ranks, trials, tried, load)
    return trials


@compile_fast
def drop_clones(ranks: Ranks, counts: Array, near_price: int, far_price: int, experts: Array, tokens: Array, load: Array) -> None:
    """Empty shared slots that the split does not use, then those with few tokens whose clones cost more than they save."""
    slots, size = experts.shape[0], load.shape[0]
    used: Array = np.flatnonzero(ranks.is_shared & (experts >= 0))
    used = used[np.argsort(tokens[used], kind="mergesort")]
    left, borne = np.empty(slots, np.int64), np.empty(size, np.int64)
    trials = DROP_VISITS // (slots + size)
    for slot in used:
        expert = experts[slot]
        price = near_price if is_near(ranks, slot, expert) else far_price
        most, home = load.max(), ranks.homes[expert]
        back = load[ranks.rank_of_slot[home]] + tokens[slot]
        if max(most, back) * UNIT < most * UNIT + price:
            # Its home has room for what it computes.
            experts[slot] = -1
            tokens[home] += tokens[slot]
            load[ranks.rank_of_slot[home]] = back
            load[ranks.rank_of_slot[slot]] -= tokens[slot]
            tokens[slot] = 0
        elif trials > 0:
            trials -= 1
            experts[slot] = -1
            # The most tokens that a rank may have for the clone not to pay.
            start_at_home(ranks, counts, most + (price - 1) // UNIT, experts, left, borne)
            if borne.max() * UNIT < most * UNIT + price:
                split_layer(counts, link_slots(experts, ranks.rank_of_slot, ranks.rank_start, ranks.homes), tokens, load)
            else:
                experts[slot] = expert
    for slot in used:
        if tokens[slot] == 0:
            experts[slot] = -1


@compile_fast
def take_cheaper(ranks: Ranks, trials: Trials, tried: Array, load: Array) -> Trials:
    """Return the trials with ``tried`` as the best if it costs less, its clones included."""
    cost = load.max() * UNIT + price_clones(ranks, tried, trials.near_price, trials.far_price)
    if cost >= trials.least:
        return trials
    return Trials(tried.copy(), cost, load.max(), trials.near_price, trials.far_price)


@compile_fast
def price_clones(ranks: Ranks, experts: Array, near_price: int, far_price: int) -> int:
    """Return the sum of the prices of the clones in shared slots."""
    near, far = count_clones(ranks, experts)
    return near * near_price + far * far_price


@compile_fast
def count_clones(ranks: Ranks, experts: Array) -> tuple[int, int]:
    """Return how many shared slots hold a clone whose home is on their own node, and on another."""
    near, far = 0, 0
    for slot in range(experts.shape[0]):
        if ranks.is_shared[slot] and experts[slot] >= 0:
            if is_near(ranks, slot, experts[slot]):
                near += 1
            else:
                far += 1
    return near, far


@compile_fast
def is_near(ranks: Ranks, slot: int, expert: int) -> bool:
    """Tell whether a slot is on the node of an expert's home."""
    home = ranks.rank_of_slot[ranks.homes[expert]]
    return bool(ranks.node_of_rank[home] == ranks.node_of_rank[ranks.rank_of_slot[slot]])


@compile_fast
def merge_nodes(ranks: Ranks, favour: int) -> Ranks:
    """Return ``ranks`` as if all were on one node, with so much favour for donors on the taker's machine."""
    size = ranks.node_of_rank.shape[0]
    return Ranks(
        ranks.rank_of_slot,
        ranks.rank_start,
        np.zeros(size, np.int64),
        np.arange(size),
        np.array([0, size]),
        ranks.homes,
        ranks.is_home,
        ranks.is_shared,
        ranks.node_of_rank,
        favour,
    )


@compile_fast
def settle_ranks(ranks: Ranks, counts: Array, pace: int, experts: Array, tokens: Array, load: Array) -> None:
    """Clone experts on the ranks that lack most, one after the other, until no rank has more than ``pace`` or nothing helps.

    Nodes that have more than their ranks can take at this pace give the excess to others; apart from that, every node settles on
    its own.
    """
    start_at_home(ranks, counts, pace, experts, tokens, load)
    level, excess = level_nodes(ranks, pace, load)
    is_open = np.empty(load.shape[0], np.bool_)
    for rank in range(load.shape[0]):
        is_open[rank] = find_free(ranks, rank, experts) >= 0
    while load.max() > pace:
        taker = find_lacking(ranks, level, load, is_open)
        if taker < 0:
            return
        is_open[taker] = False
        node = ranks.node_of_rank[taker]
        room = level[node] - load[taker]
        slot, amount = find_donor(ranks, node, level[node], taker, room, room, experts, tokens, load)
        giver = int(excess.argmax())
        most = min(excess[giver], -excess[node])
        if most > 0:
            far_slot, far_amount = find_donor(ranks, giver, level[giver], taker, room, most, experts, tokens, load)
            if far_amount == room or far_amount > amount:
                slot, amount = far_slot, far_amount
        if amount == 0:
            continue
        source = ranks.node_of_rank[ranks.rank_of_slot[slot]]
        excess[source] -= amount
        excess[node] += amount
        place_clone(ranks, slot, taker, amount, experts, tokens, load)


@compile_fast
def find_lacking(ranks: Ranks, level: Array, load: Array, is_open: Array) -> int:
    """Return the rank that lacks most to ``level[nodes]`` of those that are open, -1 where none lacks any."""
    taker, room = -1, 0
    for rank in range(load.shape[0]):
        lack = level[ranks.node_of_rank[rank]] - load[rank]
        if lack > room and is_open[rank]:
            taker, room = rank, lack
    return taker


@compile_fast
def place_clone(ranks: Ranks, slot: int, taker: int, amount: int, experts: Array, tokens: Array, load: Array) -> None:
    """Let a free slot of rank ``taker`` compute ``amount`` tokens of home ``slot``."""
    place = find_free(ranks, taker, experts)
    experts[place] = experts[slot]
    tokens[slot] -= amount
    tokens[place] += amount
    load[ranks.rank_of_slot[slot]] -= amount
    load[taker] += amount


@compile_fast
def level_nodes(ranks: Ranks, pace: int, load: Array) -> tuple[Array, Array]:
    """Return the load to which the ranks of each node are filled, ``[nodes]``, and how much more than that the node has.

    A node with more than its ranks can take at ``pace`` gives the excess away. One with less than the mean is filled to the
    mean, with that excess. The others neither give nor take.
    """
    nodes = ranks.node_start.shape[0] - 1
    excess, level = np.zeros(nodes, np.int64), np.empty(nodes, np.int64)
    for rank in range(load.shape[0]):
        excess[ranks.node_of_rank[rank]] += load[rank]
    mean = -(-excess.sum() // load.shape[0])
    for node in range(nodes):
        size = ranks.node_start[node + 1] - ranks.node_start[node]
        level[node] = min(pace, max(mean, -(-excess[node] // size)))
        excess[node] -= size * level[node]
    return level, excess


@compile_fast
def find_donor(
    ranks: Ranks, node: int, level: int, taker: int, room: int, most: int, experts: Array, tokens: Array, load: Array
) -> tuple[int, int]:
    """Return the home slot of ``node`` whose expert fills ``room`` on rank ``taker`` best, and by how many tokens.

    No more than ``most`` may move. What fills counts most, then what takes load off a rank above ``level``, then how much more
    of the expert there is. Returns -1 and 0 where nothing fills.
    """
    best, value, amount = -1, 0, 0
    wanted = min(room, most)
    for place in range(ranks.node_start[node], ranks.node_start[node + 1]):
        donor = ranks.by_node[place]
        above = min(max(0, load[donor] - level), 4 * room)
        if ranks.machine_of_rank[donor] == ranks.machine_of_rank[taker]:
            above += ranks.favour * room
        # No expert of this rank can be worth more than one that was found.
        if donor == taker or 8 * wanted + above + 2 * room <= value:
            continue
        for slot in range(ranks.rank_start[donor], ranks.rank_start[donor + 1]):
            if not ranks.is_home[slot] or tokens[slot] == 0:
                continue
            filled = min(tokens[slot], wanted)
            worth = 8 * filled + above + min(tokens[slot], 2 * room)
            if worth > value and not holds(experts, ranks.rank_start, taker, experts[slot]):
                best, value, amount = slot, worth, filled
    return best, amount


@compile_fast
def mend_ranks(ranks: Ranks, counts: Array, paces: Array, experts: Array, tokens: Array, load: Array, trials: Trials) -> Trials:
    """Clone the largest expert of the slowest rank, one at a time, from the highest pace to the lowest; return the trials then.

    Ends where the clones alone would cost more than the cheapest plan.
    """
    start_at_home(ranks, counts, paces[-1], experts, tokens, load)
    near_weight = min(max(trials.far_price, trials.near_price) * FAR_WEIGHT // trials.near_price, MOST_WEIGHT)
    cost = paces[0] * UNIT + price_clones(ranks, experts, trials.near_price, trials.far_price)
    links = link_slots(experts, ranks.rank_of_slot, ranks.rank_start, ranks.homes)
    for pace in paces[::-1]:
        while True:
            hold_pace(pace, links, tokens, load)
            donor = int(load.argmax())
            if load[donor] <= pace:
                break
            slot = find_largest(ranks, donor, tokens)
            taker = find_taker(ranks, pace, slot, near_weight, experts, tokens, load) if slot >= 0 else -1
            if taker < 0 or cost >= trials.least:
                return trials
            place = find_free(ranks, taker, experts)
            experts[place] = experts[slot]
            insert_copy(links, place)
            cost += trials.near_price if is_near(ranks, place, experts[slot]) else trials.far_price
        trials = take_cheaper(ranks, trials, experts, load)
    return trials


@compile_fast
def find_largest(ranks: Ranks, rank: int, tokens: Array) -> int:
    """Return the home slot of ``rank`` with most tokens, -1 where it has no home."""
    best = -1
    for slot in range(ranks.rank_start[rank], ranks.rank_start[rank + 1]):
        if ranks.is_home[slot] and (best < 0 or tokens[slot] > tokens[best]):
            best = slot
    return best


@compile_fast
def find_taker(ranks: Ranks, pace: int, slot: int, near_weight: int, experts: Array, tokens: Array, load: Array) -> int:
    """Return the rank that takes most tokens of home ``slot``, weighed by where it is; -1 where none can take any."""
    donor = ranks.rank_of_slot[slot]
    wanted = min(load[donor] - pace, tokens[slot])
    best, value = -1, 0
    for rank in range(load.shape[0]):
        room = pace - load[rank]
        weight = near_weight if ranks.node_of_rank[rank] == ranks.node_of_rank[donor] else FAR_WEIGHT
        worth = (2 * min(room, wanted) + room) * weight
        if room <= 0 or worth <= value:
            continue
        if find_free(ranks, rank, experts) >= 0 and not holds(experts, ranks.rank_start, rank, experts[slot]):
            best, value = rank, worth
    return best


@compile_fast
def start_at_home(ranks: Ranks, counts: Array, pace: int, experts: Array, tokens: Array, load: Array) -> None:
    """Fill ``tokens`` and ``load`` with the tokens at home, but for what other copies take so that ranks hold ``pace``."""
    tokens[:] = 0
    load[:] = 0
    for expert, slot in enumerate(ranks.homes):
        tokens[slot] = counts[expert]
        load[ranks.rank_of_slot[slot]] += counts[expert]
    hold_pace(pace, link_slots(experts, ranks.rank_of_slot, ranks.rank_start, ranks.homes), tokens, load)


@compile_fast
def hold_pace(pace: int, links: Links, tokens: Array, load: Array) -> None:
    """Move tokens between copies until no rank has more than ``pace``, or nothing can move any more."""
    size = load.shape[0]
    came_from, leaving = np.empty(size, np.int64), np.empty(size, np.int64)
    arriving, queue = np.empty(size, np.int64), np.empty(size, np.int64)
    seen = np.empty(links.first.shape[0], np.bool_)
    pushed = links.expert_start[-1] > links.first.shape[0]
    while pushed and load.max() > pace:
        reached = find_paths(pace, links, tokens, load, queue, came_from, leaving, arriving, seen)
        pushed = False
        for place in range(reached):
            if load[queue[place]] < pace:
                pushed |= push_tokens(queue[place], pace, tokens, load, came_from, leaving, arriving)


@compile_fast
def find_free(ranks: Ranks, rank: int, experts: Array) -> int:
    """Return an empty shared slot of ``rank``, -1 where there is none."""
    for slot in range(ranks.rank_start[rank], ranks.rank_start[rank + 1]):
        if ranks.is_shared[slot] and experts[slot] < 0:
            return slot
    return -1
