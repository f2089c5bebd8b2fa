"""Free placement of one layer, compiled: how many copies each expert gets, and on which ranks they lie.

The copies of an expert share its load evenly. First the number of copies is chosen, greedily. Then copies are packed onto
ranks, largest first. Then ranks trade copies until no trade makes the slowest rank faster. If it is still slow, one expert on
it gets one more copy, another expert loses one, and everything is packed again, since the best counts depend on the packing.
"""

import heapq

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels.flow import holds
from counterflow.compiling import compile_fast

# If the slowest rank has less than CLOSE times the mean load, no more trades are tried; below NEAR, no other counts of copies.
CLOSE = 1.002
NEAR = 1.005
# At most so many rounds in which ranks trade in pairs, and then so many single trades of the slowest rank.
ROUNDS = 24
TRADES = 48
# Tries with other counts of copies: LEAST_TRIES, or TRIED_SLOTS / slots where that is more.
LEAST_TRIES = 2
TRIED_SLOTS = 600
# In layers up to this many slots x experts x ranks, every expert is tried in every slot.
SMALL = 8_000


@compile_fast
def place_layer(weights: Array, rank_start: Array) -> tuple[Array, float]:
    """Return the expert of each slot, ``int64[slots]``, and the load of the slowest rank.

    ``weights[experts]`` are the loads; ``rank_start[ranks + 1]`` has the first slot of each rank. No rank holds two copies of
    an expert. The caller makes sure that there are at least as many slots as experts, and no more slots on a rank than experts.
    """
    ranks, slots = rank_start.shape[0] - 1, rank_start[-1]
    copies = count_copies(weights, slots, ranks)
    best, slowest = pack_and_trade(weights / copies, copies, rank_start)
    mean = weights.sum() / ranks
    tries = max(LEAST_TRIES, TRIED_SLOTS // slots)
    number = 0
    while number < tries and slowest > NEAR * mean:
        changed = recount(weights, copies, best, rank_start, number)
        if changed[0] < 0:
            break
        tried, tried_slowest = pack_and_trade(weights / changed, changed, rank_start)
        number += 1
        if tried_slowest < slowest * (1 - 1e-9) and (tried >= 0).all():
            best, slowest, copies = tried, tried_slowest, changed
            tries -= number
            number = 0
    if slots * weights.shape[0] * ranks <= SMALL:
        slowest = replace_copies(weights, best, rank_start, CLOSE * mean)
    if (best < 0).any():
        fill_empty(best, rank_start, weights / copies)
        slowest = sum_ranks(weights / count_held(best, weights.shape[0]), best, rank_start).max()
    return best, slowest


@compile_fast
def count_held(experts: Array, total: int) -> Array:
    """Return how many slots hold each of ``total`` experts."""
    copies = np.zeros(total, np.int64)
    for expert in experts:
        if expert >= 0:
            copies[expert] += 1
    return copies


@compile_fast
def fill_empty(experts: Array, rank_start: Array, sizes: Array) -> None:
    """Fill each slot that packing left empty, which is rare, with the largest expert that its rank does not hold."""
    for rank in range(rank_start.shape[0] - 1):
        for slot in range(rank_start[rank], rank_start[rank + 1]):
            if experts[slot] < 0:
                for expert in np.argsort(-sizes, kind="mergesort"):
                    if not holds(experts, rank_start, rank, expert):
                        experts[slot] = expert
                        break


@compile_fast
def count_copies(weights: Array, slots: int, most: int) -> Array:
    """Return each expert's number of copies, at most ``most``, such that the largest load of a copy is as small as possible."""
    copies = np.ones(weights.shape[0], np.int64)
    left = min(slots, weights.shape[0] * most) - weights.shape[0]
    shares = [(-weight, expert) for expert, weight in enumerate(weights)]
    heapq.heapify(shares)
    while left > 0:
        _, expert = heapq.heappop(shares)
        if copies[expert] == most:
            continue
        copies[expert] += 1
        left -= 1
        heapq.heappush(shares, (-weights[expert] / copies[expert], expert))
    return copies


@compile_fast
def recount(weights: Array, copies: Array, experts: Array, rank_start: Array, number: int) -> Array:
    """Return changed counts: one more copy of an expert on the slowest rank, one less of another; all -1 if none are left.

    ``number`` chooses the pair of experts. For 0, the largest expert of the slowest rank gains a copy, and the expert whose
    copies are smallest after losing one loses it. Higher numbers go through the other pairs.
    """
    ranks = rank_start.shape[0] - 1
    rank = int(np.argmax(sum_ranks(weights / copies, experts, rank_start)))
    shares = np.zeros(weights.shape[0])
    for expert in experts[rank_start[rank] : rank_start[rank + 1]]:
        if expert >= 0 and copies[expert] < ranks:
            shares[expert] = weights[expert] / copies[expert]
    more = np.argsort(-shares, kind="mergesort")[: np.count_nonzero(shares)]
    several = np.flatnonzero(copies > 1)
    fewer = several[np.argsort(weights[several] / (copies[several] - 1), kind="mergesort")]
    changed = copies.copy()
    if more.shape[0] == 0 or number >= more.shape[0] * fewer.shape[0]:
        changed[:] = -1
        return changed
    changed[more[number % more.shape[0]]] += 1
    changed[fewer[number // more.shape[0]]] -= 1
    return changed


@compile_fast
def replace_copies(weights: Array, experts: Array, rank_start: Array, target: float) -> float:
    """Put another expert into one slot, and trade copies of the slowest rank, while that helps; return the slowest rank's load.

    Of all replacements the one with the smallest largest load is taken; the sum of squared loads decides between near equals.
    """
    ranks = rank_start.shape[0] - 1
    while True:
        copies = count_held(experts, weights.shape[0])
        load = sum_ranks(weights / copies, experts, rank_start)
        help_slowest(weights / copies, experts, load, rank_start)
        # This also ends the loop if the experts have no load at all.
        if load.max() <= target:
            return float(load.max())
        best = load.max() + 1e-3 * (load**2).sum() / load.sum()
        chosen, chosen_slot = -1, -1
        for rank in range(ranks):
            for slot in range(rank_start[rank], rank_start[rank + 1]):
                held = experts[slot]
                if held < 0 or copies[held] == 1:
                    continue
                for expert in range(weights.shape[0]):
                    if holds(experts, rank_start, rank, expert):
                        continue
                    tried = load.copy()
                    shift_shares(
                        tried, experts, rank_start, held, weights[held] / (copies[held] - 1) - weights[held] / copies[held]
                    )
                    shift_shares(
                        tried,
                        experts,
                        rank_start,
                        expert,
                        weights[expert] / (copies[expert] + 1) - weights[expert] / copies[expert],
                    )
                    tried[rank] += weights[expert] / (copies[expert] + 1) - weights[held] / (copies[held] - 1)
                    value = tried.max() + 1e-3 * (tried**2).sum() / tried.sum()
                    if value < best * (1 - 1e-9):
                        best, chosen, chosen_slot = value, expert, slot
        if chosen < 0:
            return float(load.max())
        experts[chosen_slot] = chosen


@compile_fast
def shift_shares(load: Array, experts: Array, rank_start: Array, expert: int, more: float) -> None:
    """Add ``more`` to every rank that holds ``expert``."""
    for rank in range(load.shape[0]):
        if holds(experts, rank_start, rank, expert):
            load[rank] += more


@compile_fast
def sum_ranks(sizes: Array, experts: Array, rank_start: Array) -> Array:
    """Return the load of each rank; each copy of expert e has the load ``sizes[e]``."""
    load = np.zeros(rank_start.shape[0] - 1)
    for rank in range(load.shape[0]):
        for slot in range(rank_start[rank], rank_start[rank + 1]):
            if experts[slot] >= 0:
                load[rank] += sizes[experts[slot]]
    return load


@compile_fast
def pack_and_trade(sizes: Array, copies: Array, rank_start: Array) -> tuple[Array, float]:
    """Pack copies onto ranks and let ranks trade them; return the expert of each slot and the load of the slowest rank."""
    experts = pack(sizes, copies, rank_start)
    load = sum_ranks(sizes, experts, rank_start)
    trade_in_pairs(sizes, experts, load, rank_start)
    help_slowest(sizes, experts, load, rank_start)
    return experts, float(load.max())


@compile_fast
def pack(sizes: Array, copies: Array, rank_start: Array) -> Array:
    """Put copies into slots, the largest first, each on the least loaded rank with a free slot and no copy of that expert.

    If all ranks with a free slot hold the expert already, `make_place` moves another copy out of the way.
    """
    experts = np.full(rank_start[-1], -1)
    used = np.zeros(rank_start.shape[0] - 1, np.int64)
    lightest = [(0.0, rank) for rank in range(used.shape[0]) if rank_start[rank + 1] > rank_start[rank]]
    heapq.heapify(lightest)
    for name in np.argsort(-sizes, kind="mergesort"):
        expert = int(name)
        passed = [(0.0, 0)][:0]
        for _ in range(copies[expert]):
            rank = -1
            while len(lightest) > 0 and rank < 0:
                load, candidate = heapq.heappop(lightest)
                if used[candidate] == rank_start[candidate + 1] - rank_start[candidate]:
                    continue
                if holds(experts, rank_start, candidate, expert):
                    passed.append((load, candidate))
                else:
                    rank = candidate
            if rank < 0:
                make_place(experts, used, rank_start, expert)
                continue
            experts[rank_start[rank] + used[rank]] = expert
            used[rank] += 1
            heapq.heappush(lightest, (load + sizes[expert], rank))
        for entry in passed:
            heapq.heappush(lightest, entry)
    return experts


@compile_fast
def make_place(experts: Array, used: Array, rank_start: Array, expert: int) -> None:
    """Move some copy from a full rank without ``expert`` to a rank with a free slot, and put ``expert`` into its place."""
    for rank in range(used.shape[0]):
        free = rank_start[rank] + used[rank]
        if free == rank_start[rank + 1]:
            continue
        for slot in range(experts.shape[0]):
            other = experts[slot]
            if other < 0 or holds(experts, rank_start, rank, other):
                continue
            owner = int(np.searchsorted(rank_start, slot, side="right")) - 1
            if not holds(experts, rank_start, owner, expert):
                experts[free], experts[slot] = other, expert
                used[rank] += 1
                return


@compile_fast
def trade_in_pairs(sizes: Array, experts: Array, load: Array, rank_start: Array) -> None:
    """Trade in rounds: the slowest rank with the fastest, the second slowest with the second fastest, and so on."""
    ranks = load.shape[0]
    mean = load.sum() / ranks
    for round_ in range(ROUNDS):
        order = np.argsort(load, kind="mergesort")
        traded = False
        for place in range(ranks // 2):
            slow = order[ranks - 1 - place]
            if load[slow] <= mean:
                break
            # After every four rounds, each slow rank gets another partner.
            traded |= trade(sizes, experts, load, rank_start, slow, order[(place + round_ // 4) % ((ranks + 1) // 2)], load[slow])
        if load.max() <= CLOSE * mean or (not traded and round_ >= ROUNDS // 2):
            return


@compile_fast
def help_slowest(sizes: Array, experts: Array, load: Array, rank_start: Array) -> None:
    """Let the slowest rank trade with the fastest rank that makes it faster, again and again, until no rank does."""
    mean = load.sum() / load.shape[0]
    for _ in range(TRADES):
        slow = int(np.argmax(load))
        if load[slow] <= CLOSE * mean:
            return
        helped = False
        for rank in np.argsort(load, kind="mergesort"):
            if load[rank] >= mean or helped:
                break
            helped = trade(sizes, experts, load, rank_start, slow, int(rank), load[slow])
        if not helped:
            return


@compile_fast
def trade(sizes: Array, experts: Array, load: Array, rank_start: Array, slow: int, fast: int, below: float) -> bool:
    """Swap the best pair of copies between ranks ``slow`` and ``fast``; tell whether a pair was swapped.

    The best pair leaves the smallest load on the slower of the two ranks. That load has to be less than ``below``.
    """
    best, given, taken = below * (1 - 1e-9), -1, -1
    for slot in range(rank_start[slow], rank_start[slow + 1]):
        size = sizes[experts[slot]] if experts[slot] >= 0 else 0.0
        for other in range(rank_start[fast], rank_start[fast + 1]):
            less = size - (sizes[experts[other]] if experts[other] >= 0 else 0.0)
            after = max(load[slow] - less, load[fast] + less)
            if less <= 0 or after >= best:
                continue
            if holds(experts, rank_start, fast, experts[slot]) or (
                experts[other] >= 0 and holds(experts, rank_start, slow, experts[other])
            ):
                continue
            best, given, taken = after, slot, other
    if given < 0:
        return False
    less = sizes[experts[given]] - (sizes[experts[taken]] if experts[taken] >= 0 else 0.0)
    experts[given], experts[taken] = experts[taken], experts[given]
    load[slow] -= less
    load[fast] += less
    return True
