"""Searching better homes for one layer's experts, compiled: experts of a column change places.

A column is what stands at one place among the homes of every rank. The search swaps two experts of a column at a time, one of
them on a slowest rank, always the pair that takes most off the slowest ranks, all forecasts together; where nothing does,
since several ranks are equally slow, a pair that takes nothing off but levels the two ranks. Then whatever can go back to
where it was at so little loss that its move does not pay, does.
"""

import numpy as np

from counterflow.arrays import Array
from counterflow.compiling import compile_fast

# A layer's search ends after so many swaps per expert. It needs less than one; this is against loads that deceive it.
MOST_SWAPS = 4


@compile_fast
def swap_homes(loads: Array, start: Array, held: Array, most: int, price: float, node_of_rank: Array) -> Array:
    """Return ``held`` after swaps that make the slowest rank faster, none receiving more than ``most`` experts since ``start``.

    ``loads[experts, forecasts]``: whole numbers. ``start`` and ``held``: ``[columns, ranks]``, experts, -1 where a rank has none.
    ``price``: what an expert that is not where it was must gain, summed over the forecasts. ``node_of_rank[ranks]``: a swap
    between nodes is made only where none within a node helps.
    """
    held = held.copy()
    load = sum_loads(loads, held)
    received = (held != start).sum(0)
    for _ in range(MOST_SWAPS * loads.shape[0]):
        slowest = find_slowest(load)
        column, rank, other = find_swap(loads, start, held, load, slowest, received, most, node_of_rank)
        if column < 0 and node_of_rank.max() > 0:
            column, rank, other = find_swap(loads, start, held, load, slowest, received, most, np.zeros_like(node_of_rank))
        if column < 0:
            break
        swap(loads, start, held, load, received, column, rank, other)
    bring_back(loads, start, held, load, received, price)
    return held


@compile_fast
def sum_loads(loads: Array, held: Array) -> Array:
    """Return ``load[ranks, forecasts]`` of the experts that each rank holds."""
    load = np.zeros((held.shape[1], loads.shape[1]), np.int64)
    for column in held:
        for rank, expert in enumerate(column):
            if expert >= 0:
                load[rank] += loads[expert]
    return load


@compile_fast
def find_slowest(load: Array) -> Array:
    """Return ``[forecasts, 3]``: the three slowest ranks, -1 where there are fewer. So the slowest beside any two is known."""
    slowest = np.full((load.shape[1], 3), -1)
    for forecast in range(load.shape[1]):
        three = slowest[forecast]
        for rank in range(load.shape[0]):
            place = 3
            while place > 0 and (three[place - 1] < 0 or load[rank, forecast] > load[three[place - 1], forecast]):
                place -= 1
            if place < 3:
                three[place + 1 :] = three[place:-1].copy()
                three[place] = rank
    return slowest


@compile_fast
def find_swap(
    loads: Array,
    start: Array,
    held: Array,
    load: Array,
    slowest: Array,
    received: Array,
    most: int,
    node_of_rank: Array,
) -> tuple[int, int, int]:
    """Return the column and the two ranks of a node whose swap takes most off the slowest ranks, then levels most.

    Returns -1 where none does.
    """
    best, least = (-1, -1, -1), (0, 0.0)
    for rank in np.unique(slowest[:, 0]):
        for column in range(held.shape[0]):
            if held[column, rank] < 0:
                continue
            for other in range(held.shape[1]):
                if other == rank or node_of_rank[other] != node_of_rank[rank] or held[column, other] < 0:
                    continue
                if overfills(start, held, received, most, column, rank, other):
                    continue
                change = weigh_swap(loads, held, load, slowest, column, rank, other)
                if change < least:
                    best, least = (column, rank, other), change
    return best


@compile_fast
def overfills(start: Array, held: Array, received: Array, most: int, column: int, rank: int, other: int) -> bool:
    """Tell whether after a swap one of the two ranks would have received more than ``most`` experts."""
    for to, source in ((rank, other), (other, rank)):
        gained = int(held[column, source] != start[column, to]) - int(held[column, to] != start[column, to])
        if gained > 0 and received[to] + gained > most:
            return True
    return False


@compile_fast
def weigh_swap(loads: Array, held: Array, load: Array, slowest: Array, column: int, rank: int, other: int) -> tuple[int, float]:
    """Return what a swap adds to the slowest ranks' loads, and to half the sum of squares of all loads, over all forecasts."""
    time, spread = 0, 0.0
    for forecast in range(load.shape[1]):
        more = loads[held[column, other], forecast] - loads[held[column, rank], forecast]
        after = max(load[rank, forecast] + more, load[other, forecast] - more)
        for third in slowest[forecast]:
            if third >= 0 and third != rank and third != other:
                after = max(after, load[third, forecast])
                break
        time += after - load[slowest[forecast, 0], forecast]
        spread += float(more) * (load[rank, forecast] - load[other, forecast] + more)
    return time, spread


@compile_fast
def swap(loads: Array, start: Array, held: Array, load: Array, received: Array, column: int, rank: int, other: int) -> None:
    """Let the experts of two ranks in a column change places."""
    one, two = held[column, rank], held[column, other]
    load[rank] += loads[two] - loads[one]
    load[other] += loads[one] - loads[two]
    received[rank] += int(two != start[column, rank]) - int(one != start[column, rank])
    received[other] += int(one != start[column, other]) - int(two != start[column, other])
    held[column, rank], held[column, other] = two, one


@compile_fast
def bring_back(loads: Array, start: Array, held: Array, load: Array, received: Array, price: float) -> None:
    """Swap experts back to where they were at the start, while that costs no more than ``price`` for each that is back."""
    rank_of_expert = np.empty(loads.shape[0], np.int64)
    for column in start:
        for rank, expert in enumerate(column):
            if expert >= 0:
                rank_of_expert[expert] = rank
    slowest = find_slowest(load)
    found = True
    while found:
        found = False
        for column in range(held.shape[0]):
            for rank in range(held.shape[1]):
                if held[column, rank] == start[column, rank]:
                    continue
                before = rank_of_expert[held[column, rank]]
                back = 2 if held[column, before] == start[column, rank] else 1
                if weigh_swap(loads, held, load, slowest, column, rank, before)[0] <= price * back:
                    swap(loads, start, held, load, received, column, rank, before)
                    slowest = find_slowest(load)
                    found = True
