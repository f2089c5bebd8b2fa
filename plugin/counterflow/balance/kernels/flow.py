"""The token split's inner loop, compiled: tokens flow from overloaded ranks to others, between copies of the same expert."""

from typing import NamedTuple

import numpy as np

from counterflow.arrays import Array
from counterflow.compiling import compile_fast


class Links(NamedTuple):
    """Index of one layer's slots, by rank and by expert.

    ``experts[slots]`` and ``rank_of_slot[slots]`` say what a slot holds and where it is. Rank r has the slots
    ``rank_start[r]`` to ``rank_start[r + 1]``. The slots that hold expert e are ``copies[expert_start[e]:expert_start[e + 1]]``,
    in order; ``copies[slots]`` has room for every slot.
    All tokens of e start in slot ``first[e]`` and leave it only if that makes the slowest rank faster.
    """

    experts: Array
    rank_of_slot: Array
    rank_start: Array
    copies: Array
    expert_start: Array
    first: Array


@compile_fast
def holds(experts: Array, rank_start: Array, rank: int, expert: int) -> bool:
    """Tell whether a slot of ``rank`` holds ``expert``."""
    for slot in range(rank_start[rank], rank_start[rank + 1]):  # noqa: SIM110, any() of a generator does not compile
        if experts[slot] == expert:
            return True
    return False


@compile_fast
def link_slots(experts: Array, rank_of_slot: Array, rank_start: Array, homes: Array) -> Links:
    """Return the links of a layer. ``experts[slots]`` is -1 for empty slots; ``homes[experts]`` is a slot, or -1 for any slot."""
    count = homes.shape[0]
    expert_start = np.zeros(count + 1, np.int64)
    for expert in experts:
        if expert >= 0:
            expert_start[expert + 1] += 1
    for expert in range(count):
        expert_start[expert + 1] += expert_start[expert]
    copies = np.empty(experts.shape[0], np.int64)
    filled = expert_start[:-1].copy()
    for slot, expert in enumerate(experts):
        if expert >= 0:
            copies[filled[expert]] = slot
            filled[expert] += 1
    first = homes.copy()
    for expert in range(count):
        if first[expert] < 0:
            first[expert] = copies[expert_start[expert]]
    return Links(experts, rank_of_slot, rank_start, copies, expert_start, first)


@compile_fast
def insert_copy(links: Links, slot: int) -> None:
    """Let ``links`` know of a slot that was empty when they were made and holds an expert now."""
    expert, count = links.experts[slot], links.first.shape[0]
    place = links.expert_start[count]
    # All behind the expert's own copies move on by one, and so do its copies in later slots.
    while place > links.expert_start[expert] and (place > links.expert_start[expert + 1] or links.copies[place - 1] > slot):
        links.copies[place] = links.copies[place - 1]
        place -= 1
    links.copies[place] = slot
    links.expert_start[expert + 1 :] += 1


@compile_fast
def split_layer(counts: Array, links: Links, tokens: Array, load: Array) -> int:
    """Split ``counts[experts]`` over the slots such that the largest load of a rank is as small as possible.

    Fills ``tokens[slots]`` and ``load[ranks]``; returns the largest load. Only as many tokens leave the first slot of their
    expert as this needs.
    """
    tokens[:] = 0
    load[:] = 0
    for expert in range(counts.shape[0]):
        if counts[expert] > 0:
            slot = links.first[expert]
            tokens[slot] = counts[expert]
            load[links.rank_of_slot[slot]] += counts[expert]
    return level_ranks(links, tokens, load)


@compile_fast
def level_ranks(links: Links, tokens: Array, load: Array) -> int:
    """Move tokens between copies until the largest load of a rank is as small as possible; return that load.

    The limit is a lower bound on the largest load, at first the mean. Ranks above the limit push tokens along paths of copies
    to ranks below it. If no rank below the limit can be reached, the tokens of the reached ranks cannot leave these ranks, so
    the mean of the reached ranks is a higher lower bound and becomes the limit. The loop ends when no rank is above the limit:
    the largest load then equals a lower bound, so it is optimal.
    """
    ranks = load.shape[0]
    limit = -(-load.sum() // ranks)
    came_from = np.empty(ranks, np.int64)
    leaving = np.empty(ranks, np.int64)
    arriving = np.empty(ranks, np.int64)
    queue = np.empty(ranks, np.int64)
    seen = np.empty(links.first.shape[0], np.bool_)
    while load.max() > limit:
        reached = find_paths(limit, links, tokens, load, queue, came_from, leaving, arriving, seen)
        pushed = False
        for place in range(reached):
            end = queue[place]
            if load[end] < limit:
                pushed |= push_tokens(end, limit, tokens, load, came_from, leaving, arriving)
        if not pushed:
            held = 0
            for place in range(reached):
                held += load[queue[place]]
            limit = -(-held // reached)
    return int(limit)


@compile_fast
def find_paths(
    limit: int,
    links: Links,
    tokens: Array,
    load: Array,
    queue: Array,
    came_from: Array,
    leaving: Array,
    arriving: Array,
    seen: Array,
) -> int:
    """Find, breadth first, all ranks that tokens can reach from ranks above ``limit``; return how many ``queue`` then holds.

    For a rank r of ``queue``, ``came_from[r]`` is the rank before it on its path, -1 if r itself is above the limit. Tokens
    leave slot ``leaving[r]`` of that rank for slot ``arriving[r]`` of r. ``seen[experts]`` is scratch space.
    """
    came_from[:] = -2
    seen[:] = False
    reached = 0
    for rank in range(load.shape[0]):
        if load[rank] > limit:
            queue[reached] = rank
            reached += 1
            came_from[rank] = -1
    looked = 0
    while looked < reached:
        rank = queue[looked]
        looked += 1
        for slot in range(links.rank_start[rank], links.rank_start[rank + 1]):
            expert = links.experts[slot]
            if tokens[slot] == 0 or seen[expert]:
                continue
            seen[expert] = True
            for place in range(links.expert_start[expert], links.expert_start[expert + 1]):
                copy = links.copies[place]
                other = links.rank_of_slot[copy]
                if came_from[other] == -2:
                    came_from[other], leaving[other], arriving[other] = rank, slot, copy
                    queue[reached] = other
                    reached += 1
    return reached


@compile_fast
def push_tokens(end: int, limit: int, tokens: Array, load: Array, came_from: Array, leaving: Array, arriving: Array) -> bool:
    """Push tokens along the path to rank ``end``; tell whether any moved.

    The amount is limited by the tokens in each slot of the path, by what the path's first rank has above the limit, and by
    the room of ``end`` below it.
    """
    amount = limit - load[end]
    rank = end
    while came_from[rank] >= 0:
        amount = min(amount, tokens[leaving[rank]])
        rank = came_from[rank]
    amount = min(amount, load[rank] - limit)
    if amount <= 0:
        return False
    load[rank] -= amount
    load[end] += amount
    rank = end
    while came_from[rank] >= 0:
        tokens[leaving[rank]] -= amount
        tokens[arriving[rank]] += amount
        rank = came_from[rank]
    return True


@compile_fast
def split_layers(counts: Array, experts: Array, rank_of_slot: Array, rank_start: Array, homes: Array) -> Array:
    """Return the tokens of each slot, ``[layers, slots]``."""
    tokens = np.empty(experts.shape, np.int64)
    load = np.empty(rank_start.shape[0] - 1, np.int64)
    for layer in range(counts.shape[0]):
        links = link_slots(experts[layer], rank_of_slot, rank_start, homes[layer])
        split_layer(counts[layer], links, tokens[layer], load)
    return tokens
