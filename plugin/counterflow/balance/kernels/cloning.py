"""Planning clones where homes are fixed, compiled: a greedy that fills spare slots, then a search that changes them one by one.

Both plan for several forecasts of the next micro-batch's load at once, since a clone that is right for the mean alone often
has nothing to give when the load turns out a little different. What a placement is worth is found with the token split that
will be used with it. The greedy rests on one observation. To level R ranks takes R - 1 transfers at most, as to settle debts
among R people: each fills the rank that lacks most, from a rank that has too much, even where that one then lacks something
itself and is filled later. So every rank receives about once, and one spare slot per rank is nearly enough, as long as there
are experts large enough to carry the load.
"""

import heapq
from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels.flow import holds, level_ranks, link_slots, split_layer
from counterflow.compiling import compile_fast

# Loads are scaled to this mean per rank.
MEAN = 1 << 16
# The search may visit so many slots and ranks, all its splits together: about half a millisecond per layer.
VISITS = 12_000
# Of the most loaded ranks so many are looked at to fill one slot.
SOURCES = 8
# A placement with an expected time below this is mended only, not made anew.
GOOD = 1.05
NEVER = 1e30


class Layer(NamedTuple):
    """One layer to plan for.

    ``loads[forecasts, experts]`` whole numbers, ``homes[expert]`` its home slot, ``spare`` the slots for clones; ``price`` what a
    clone that has to be sent costs, ``far_price`` what it costs if its home is on another node, ``traffic`` what a token computed
    off its home's node costs, of a token on the slowest rank times ranks.
    """

    loads: Array
    rank_of_slot: Array
    rank_start: Array
    node_of_rank: Array
    homes: Array
    spare: Array
    price: float
    far_price: float
    traffic: float


class Weighed(NamedTuple):
    """A placement of a layer, its splits ``tokens[forecasts, slots]`` and ``load[forecasts, ranks]``, and the expected time.

    The time is the slowest rank's, traffic included, in units of the mean rank's load: the mean over the forecasts.
    """

    experts: Array
    tokens: Array
    load: Array
    time: float


@compile_fast
def plan_layer(layer: Layer, current: Array) -> tuple[Array, float, float]:
    """Return the experts of the slots, and the expected times with the ``current`` ones and with those."""
    before = weigh(layer, current)
    kept = before
    if (current[layer.spare] >= 0).any():
        kept = improve(layer, before)
        if kept.time < GOOD:
            return kept.experts, before.time, kept.time
    fresh = weigh(layer, fill_slots(layer, current))
    more = price_new(layer, current, fresh.experts) - price_new(layer, current, kept.experts)
    best = improve(layer, fresh) if fresh.time + more < kept.time else kept
    if layer.traffic > 0:
        # Many splits are equally fast; the one that will be used may send more off its node than the one found step by step.
        best = weigh(layer, best.experts)
        if best.time > before.time - price_new(layer, current, best.experts):
            best = before
    return best.experts, before.time, best.time


@compile_fast
def price_new(layer: Layer, current: Array, experts: Array) -> float:
    """Return what the clones of ``experts`` cost that are not on their rank in ``current``, so that they have to be sent."""
    cost = 0.0
    for slot in layer.spare:
        if experts[slot] >= 0 and not holds(current, layer.rank_start, layer.rank_of_slot[slot], experts[slot]):
            cost += price_clone(layer, slot, experts[slot])
    return cost


@compile_fast
def price_clone(layer: Layer, slot: int, expert: int) -> float:
    """Return what it costs to send ``expert`` from its home to ``slot``."""
    home = layer.rank_of_slot[layer.homes[expert]]
    near = layer.node_of_rank[home] == layer.node_of_rank[layer.rank_of_slot[slot]]
    return layer.price if near else layer.far_price


@compile_fast
def weigh(layer: Layer, experts: Array) -> Weighed:
    """Return a placement with the expected time and the splits behind it."""
    links = link_slots(experts, layer.rank_of_slot, layer.rank_start, layer.homes)
    forecasts = layer.loads.shape[0]
    tokens = np.empty((forecasts, experts.shape[0]), np.int64)
    load = np.empty((forecasts, layer.node_of_rank.shape[0]), np.int64)
    time = 0.0
    for forecast in range(forecasts):
        slowest = split_layer(layer.loads[forecast], links, tokens[forecast], load[forecast])
        time += (max(slowest, MEAN) + layer.traffic * count_away(layer, experts, tokens[forecast])) / MEAN
    return Weighed(experts, tokens, load, time / forecasts)


@compile_fast
def weigh_change(layer: Layer, placed: Weighed, slot: int, expert: int, limit: float) -> Weighed:
    """Return ``placed`` with ``expert`` in ``slot``; its time is `NEVER`, found sooner, where it is over ``limit``."""
    experts, tokens, load = placed.experts.copy(), placed.tokens.copy(), placed.load.copy()
    given = experts[slot]
    experts[slot] = expert
    links = link_slots(experts, layer.rank_of_slot, layer.rank_start, layer.homes)
    forecasts = layer.loads.shape[0]
    time = 0.0
    for forecast in range(forecasts):
        if given >= 0:
            # What the slot computed goes back home first.
            home, amount = layer.homes[given], tokens[forecast, slot]
            tokens[forecast, slot] = 0
            tokens[forecast, home] += amount
            load[forecast, layer.rank_of_slot[slot]] -= amount
            load[forecast, layer.rank_of_slot[home]] += amount
        slowest = level_ranks(links, tokens[forecast], load[forecast])
        time += (max(slowest, MEAN) + layer.traffic * count_away(layer, experts, tokens[forecast])) / MEAN
        # The others take 1 at least.
        if (time + forecasts - forecast - 1) / forecasts > limit:
            return Weighed(experts, tokens, load, NEVER)
    return Weighed(experts, tokens, load, time / forecasts)


@compile_fast
def count_away(layer: Layer, experts: Array, tokens: Array) -> float:
    """Return the tokens computed off their home's node, per rank."""
    away = 0
    if layer.traffic > 0:
        for slot in layer.spare:
            if experts[slot] >= 0:
                home = layer.rank_of_slot[layer.homes[experts[slot]]]
                if layer.node_of_rank[home] != layer.node_of_rank[layer.rank_of_slot[slot]]:
                    away += tokens[slot]
    return float(away / layer.node_of_rank.shape[0])


@compile_fast
def improve(layer: Layer, placed: Weighed) -> Weighed:
    """Change one clone at a time, while it pays by more than the price of a clone and while there are trials left."""
    forecasts, slots = placed.tokens.shape
    trials = max(4, VISITS // (forecasts * (slots + placed.load.shape[1])))
    found = True
    while found and trials > 0:
        found, trials, placed = try_changes(layer, placed, trials)
    return placed


@compile_fast
def try_changes(layer: Layer, placed: Weighed, trials: int) -> tuple[bool, int, Weighed]:
    """Return whether a change pays, how many trials are left, and the placement with the first change that does."""
    hot, places = rank_candidates(layer, placed)
    # Along the diagonals: hot experts in little used slots first.
    for diagonal in range(hot.shape[0] + places.shape[0] - 1):
        for index in range(max(0, diagonal - hot.shape[0] + 1), min(diagonal + 1, places.shape[0])):
            slot, expert = places[index], hot[diagonal - index]
            if holds(placed.experts, layer.rank_start, layer.rank_of_slot[slot], expert):
                continue
            if trials == 0:
                return False, 0, placed
            trials -= 1
            limit = placed.time - price_clone(layer, slot, expert) - 1e-9
            tried = weigh_change(layer, placed, slot, expert, limit)
            if tried.time <= limit:
                return True, trials, tried
    return False, trials, placed


@compile_fast
def rank_candidates(layer: Layer, placed: Weighed) -> tuple[Array, Array]:
    """Return the experts on slowest ranks, those that hold up most first, and the spare slots, those used least first."""
    experts = placed.experts
    heat = np.zeros(layer.loads.shape[1])
    use = np.zeros(experts.shape[0])
    for forecast in range(layer.loads.shape[0]):
        load = placed.load[forecast]
        slowest = load.max()
        for slot, amount in enumerate(placed.tokens[forecast]):
            use[slot] += amount
            if amount > 0 and load[layer.rank_of_slot[slot]] == slowest and slowest > MEAN:
                heat[experts[slot]] += (slowest - MEAN) * min(amount, MEAN)
    hot = np.argsort(-heat, kind="mergesort")
    return hot[: np.count_nonzero(heat)], layer.spare[np.argsort(use[layer.spare], kind="mergesort")]


@compile_fast
def fill_slots(layer: Layer, current: Array) -> Array:
    """Return a placement made from nothing but the homes: spare slots are filled in turn, always on the rank that lacks most."""
    forecasts, ranks = layer.loads.shape[0], layer.node_of_rank.shape[0]
    experts = current.copy()
    experts[layer.spare] = -1
    tokens = np.zeros((experts.shape[0], forecasts), np.int64)
    load = np.zeros((ranks, forecasts), np.int64)
    for expert, slot in enumerate(layer.homes):
        tokens[slot] = layer.loads[:, expert]
        load[layer.rank_of_slot[slot]] += layer.loads[:, expert]
    # Ranks with a free slot by what they lack, and all ranks by their load; entries that no longer hold are passed over.
    lacking = [(-count_lack(load[rank]), rank) for rank in range(ranks)]
    loaded = [(-load[rank].sum(), rank) for rank in range(ranks)]
    heapq.heapify(lacking)
    heapq.heapify(loaded)
    while len(lacking) > 0:
        lack, rank = heapq.heappop(lacking)
        place = find_free_slot(layer, experts, rank)
        if place < 0:
            continue
        if -lack != count_lack(load[rank]):
            heapq.heappush(lacking, (-count_lack(load[rank]), rank))
            continue
        source = find_source(layer, experts, tokens, load, rank, loaded)
        if source < 0:
            continue
        experts[place] = experts[source]
        other = layer.rank_of_slot[source]
        for forecast in range(forecasts):
            moved = min(tokens[source, forecast], max(0, MEAN - load[rank, forecast]))
            tokens[source, forecast] -= moved
            tokens[place, forecast] += moved
            load[other, forecast] -= moved
            load[rank, forecast] += moved
        for changed in (rank, other):
            heapq.heappush(lacking, (-count_lack(load[changed]), changed))
            heapq.heappush(loaded, (-load[changed].sum(), changed))
    return experts


@compile_fast
def count_lack(load: Array) -> int:
    """Return what a rank lacks to the mean, summed over the forecasts."""
    lack = 0
    for amount in load:
        lack += max(0, MEAN - amount)
    return lack


@compile_fast
def find_free_slot(layer: Layer, experts: Array, rank: int) -> int:
    """Return an empty slot of ``rank``, -1 where there is none."""
    for slot in range(layer.rank_start[rank], layer.rank_start[rank + 1]):
        if experts[slot] < 0:
            return slot
    return -1


@compile_fast
def find_source(layer: Layer, experts: Array, tokens: Array, load: Array, rank: int, loaded: list[tuple[int, int]]) -> int:
    """Return the slot whose expert fills ``rank`` best, of the most loaded ranks; -1 where they have none that is not there yet.

    What fills counts most, then what takes load off a rank above the mean, then how much more of the expert there is, for a
    load that turns out otherwise. ``loaded``: a heap of minus a rank's load, and the rank.
    """
    best, value = -1, -1.0
    looked = [(0, 0)][:0]
    while len(loaded) > 0 and len(looked) < SOURCES:
        entry = heapq.heappop(loaded)
        other = entry[1]
        if -entry[0] != load[other].sum() or (len(looked) > 0 and looked[-1] == entry):
            continue
        looked.append(entry)
        if other == rank or (best >= 0 and load[other].sum() <= MEAN * load.shape[1]):
            continue
        near = layer.node_of_rank[rank] == layer.node_of_rank[other]
        for slot in range(layer.rank_start[other], layer.rank_start[other + 1]):
            if experts[slot] < 0 or holds(experts, layer.rank_start, rank, experts[slot]):
                continue
            worth = 0.0
            for forecast in range(tokens.shape[1]):
                amount = tokens[slot, forecast]
                room = max(0, MEAN - load[rank, forecast])
                filled = min(amount, room)
                worth += filled * (1.0 if near else 1.0 - layer.traffic)
                worth += min(max(0, load[other, forecast] - MEAN), 4 * room) / 8 + min(amount, 2 * room) / 8
            if worth > value:
                best, value = slot, worth
    for entry in looked:
        heapq.heappush(loaded, entry)
    return best
