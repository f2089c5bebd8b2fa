"""The gate before homes move: whether the load has settled elsewhere for long enough to pay for a move."""

from collections.abc import Callable

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.costs import HOME, Costs
from counterflow.balance.homes import place_homes, search_homes
from counterflow.balance.placement import Placement

# The gate looks back so many steps at most and at least, and takes so many of their micro-batches to plan from and to judge by.
MOST_STEPS, LEAST_STEPS = 32, 4
PLANNED_FROM, JUDGED_BY = 8, 16
# A gain counts by what is left of it after so many standard errors, since micro-batches differ by chance.
ERRORS = 3.0
# A swap is undone where it gains less than so many times what its transfers take of every rank's time.
UNDO = 8.0

# A layer's homes stay where moves would gain less of the time that the mean rank computes.
LEAST_GAIN = 0.002

Judge = Callable[[Array, Array, Placement], Array]
"""From loads to plan from and to judge by, ``[samples, layers, experts]``, and a placement: ``[samples, layers]`` seconds."""


def settle_homes(past: Array, placement: Placement, step: int, costs: Costs, judge: Judge, errors: float = ERRORS) -> Placement:
    """Return ``placement``, with other homes in the layers where these pay for their move.

    ``past``, ``int64[micro-batches, layers, experts]``, are the loads so far; ``step`` micro-batches make a step. Homes are found
    from every second step and judged by the steps between, so that homes which fit one step's load, or chance, do not seem to
    gain. The gain, less ``errors`` standard errors and `LEAST_GAIN`, is counted for `MOST_STEPS` steps. A move costs the time in
    which the busiest rank receives its new homes, with masters and moments; nothing hides that. Layers that change have empty
    clone slots.
    """
    steps = min(len(past) // step, MOST_STEPS)
    if steps < LEAST_STEPS:
        return placement
    recent = past[len(past) - steps * step :].reshape(steps, step, *past.shape[1:])
    found, judged = (
        _take_samples(recent[turn::2].reshape(-1, *past.shape[1:]), most) for turn, most in enumerate((PLANNED_FROM, JUDGED_BY))
    )
    assert placement.homes is not None
    cluster, horizon = placement.cluster, MOST_STEPS * step
    empty = Placement(cluster, place_homes(placement.homes, cluster), placement.homes)
    now = judge(found, judged, empty)
    mean = judged.sum(2).mean(0) / cluster.ranks * costs.token_time
    if not (horizon * (now.mean(0) - mean) > costs.time_transfer(HOME, is_far=False)).any():
        return placement
    price = UNDO * costs.time_transfer(HOME, is_far=False) / max(float(mean.max()), costs.token_time)
    options = search_homes(found.astype(np.float64), empty, horizon, price)
    gains = np.zeros(options.shape[:2])
    for gain, option in zip(gains[1:], options[1:], strict=True):
        moved = Placement(cluster, place_homes(option, cluster), option)
        saved = now - judge(found, judged, moved)
        sure = saved.mean(0) - errors * saved.std(0) / np.sqrt(len(saved))
        gain[:] = horizon * (sure - LEAST_GAIN * mean) - time_moves(empty, moved, costs)
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


def _take_samples(counts: Array, most: int) -> Array:
    """Return at most so many of the micro-batches, evenly spaced."""
    picked: Array = counts[np.linspace(0, len(counts) - 1, min(most, len(counts))).astype(np.int64)]
    return picked
