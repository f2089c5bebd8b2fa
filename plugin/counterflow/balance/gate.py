"""The gate before homes move: whether the load has settled elsewhere for long enough to pay for a move."""

from collections.abc import Callable

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.costs import HOME, Costs
from counterflow.balance.homes import place_homes, search_homes
from counterflow.balance.placement import Placement

# The gate looks back as far as ahead, at most so many steps, and at so many micro-batches of them.
MOST_STEPS = 32
SAMPLES = 8
# By how much a move has to gain more than it costs, since what is judged by a few micro-batches is partly chance.
MARGIN = 2.0

Judge = Callable[[Array, Array, Placement], Array]
"""From ``[samples, layers, experts]`` to plan from, as many to judge by, and a placement: seconds of a micro-batch, by layer."""


def settle_homes(past: Array, placement: Placement, step: int, costs: Costs, judge: Judge) -> Placement:
    """Return ``placement``, with other homes in the layers where these pay for their move.

    ``past``, ``int64[micro-batches, layers, experts]``, are the loads so far; ``step`` micro-batches make a step. What held in
    the last steps is expected to hold for as many more. Homes are found from every second step and judged by the steps between,
    so that homes which fit one step's load, or chance, do not seem to gain. A move costs the time in which the busiest rank
    receives its new homes, weights, masters and moments, which nothing hides, and has to gain twice that. Layers that change have empty clone slots.
    """
    steps = min(len(past) // step, MOST_STEPS)
    if steps < 2:
        return placement
    horizon = steps * step
    recent = past[len(past) - horizon :].reshape(steps, step, *past.shape[1:])
    found, judged = (_take_samples(recent[turn::2].reshape(-1, *past.shape[1:])) for turn in (0, 1))
    assert placement.homes is not None
    cluster = placement.cluster
    empty = Placement(cluster, place_homes(placement.homes, cluster), placement.homes)
    now = judge(found, judged, empty)
    mean = judged.sum(2).mean(0) / cluster.ranks * costs.token_time
    if not (horizon * (now - mean) > MARGIN * costs.time_transfer(HOME, is_far=False)).any():
        return placement
    options = search_homes(found.astype(np.float64), empty, horizon, _price_home(mean, costs))
    gains = np.zeros(options.shape[:2])
    for gain, option in zip(gains[1:], options[1:], strict=True):
        moved = Placement(cluster, place_homes(option, cluster), option)
        gain[:] = horizon * (now - judge(found, judged, moved)) - MARGIN * time_moves(empty, moved, costs)
    best, layer = gains.argmax(0), np.arange(placement.layers)
    homes = options[best, layer]
    experts = np.where(best[:, None] > 0, place_homes(homes, cluster), placement.experts)
    return Placement(cluster, experts, homes)


def count_moves(old: Placement, new: Placement) -> Array:
    """Return ``int64[layers, ranks, 2]``: the homes that each rank receives from its own node, and from others."""
    assert old.homes is not None and new.homes is not None
    cluster, nodes = new.cluster, np.asarray(new.cluster.node_of_rank)
    source, target = cluster.rank_of_slot[old.homes], cluster.rank_of_slot[new.homes]
    layer, expert = np.nonzero(source != target)
    source, target = source[layer, expert], target[layer, expert]
    received = np.zeros((new.layers, cluster.ranks, 2), np.int64)
    np.add.at(received, (layer, target, (nodes[source] != nodes[target]).astype(np.int64)), 1)
    return received


def time_moves(old: Placement, new: Placement, costs: Costs) -> Array:
    """Return ``float64[layers]``: the seconds in which the busiest rank receives the homes that are new to it."""
    near, far = (costs.time_transfer(HOME, is_far=is_far) for is_far in (False, True))
    times: Array = (count_moves(old, new) @ np.array([near, far])).max(1)
    return times


def _price_home(mean: Array, costs: Costs) -> float:
    """Return what it costs to receive a home, in times of the mean rank in a micro-batch, of the layers with any load."""
    return float(costs.time_transfer(HOME, is_far=False) / max(mean.max(), costs.token_time))


def _take_samples(counts: Array) -> Array:
    """Return at most `SAMPLES` of the micro-batches, evenly spaced."""
    picked: Array = counts[np.linspace(0, len(counts) - 1, min(SAMPLES, len(counts))).astype(np.int64)]
    return picked
