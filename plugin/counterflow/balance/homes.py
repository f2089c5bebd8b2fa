"""Re-homing: choose experts that change their home, with weights, masters and moments; rarer and slower than cloning."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.clones import MOVE_PRICE, check_forecasts, check_prices, plan_clones, scale_forecasts
from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement
from counterflow.balance.planning import TRAFFIC_WEIGHT

# A home is sent with 2-byte weights, 4-byte masters and two 4-byte moments: 14 bytes for a weight; a clone has 2.
HOME_PRICE = 7 * MOVE_PRICE


@dataclass(frozen=True)
class HomePlan:
    """A placement with new homes, and the time that is expected of each layer's slowest rank, with clones planned for them.

    ``before`` is that time with the old homes, ``after`` with the new ones: ``float64[layers]``, in units of the mean rank's
    load, off-node traffic included.
    """

    placement: Placement
    before: Array
    after: Array


def plan_homes(
    forecasts: Array,
    placement: Placement,
    horizon: int,
    move_price: float = HOME_PRICE,
    traffic_weight: float = TRAFFIC_WEIGHT,
) -> HomePlan:
    """Return new homes for the layers in which that pays within ``horizon`` micro-batches.

    ``forecasts`` are those of `plan_clones`. An expert keeps its place among the homes of a rank, in the order of slots: only
    experts at the same place of two ranks are swapped. The search makes several candidates for a layer, in which a rank receives
    at most 1, 2, 4, ... experts; each consists of swaps that make the slowest rank faster without clones. Then clones are planned
    for every candidate. A layer takes the candidate that saves most time. From this, ``move_price`` of a micro-batch's time is
    subtracted for each expert that the busiest receiver receives. If no candidate saves time, the layer stays as it is. Layers
    that change have empty clone slots. Raises `BalanceError` as `plan_clones` does.
    """
    homes, forecasts = check_forecasts(forecasts, placement)
    check_prices(horizon, move_price, traffic_weight)
    options = search_homes(forecasts, placement, horizon, move_price)
    cluster = placement.cluster
    rank_of_home = cluster.rank_of_slot[options]
    came = rank_of_home != rank_of_home[0]
    received = np.stack(
        [[_count_most(ranks[new]) for ranks, new in zip(*pair, strict=True)] for pair in zip(rank_of_home, came, strict=True)]
    )
    empty = [place_homes(option, cluster) for option in options]
    stacked = Placement(cluster, np.concatenate(empty), np.concatenate(options))
    judged = plan_clones(np.tile(forecasts, (1, len(options), 1)), stacked, traffic_weight=traffic_weight)
    times = judged.after.reshape(len(options), -1)
    best = np.argmax(horizon * (times[0] - times) - move_price * received, axis=0)
    layer = np.arange(len(homes))
    experts = np.where(best[:, None] > 0, np.stack(empty)[best, layer], placement.experts)
    return HomePlan(Placement(cluster, experts, options[best, layer]), times[0], times[best, layer])


def search_homes(forecasts: Array, placement: Placement, horizon: int, move_price: float) -> Array:
    """Return homes to choose from, ``int64[options, layers, experts]``: the present ones, then those after more and more swaps.

    The arguments are those of `plan_homes`, checked.
    """
    from counterflow.balance.kernels.cloning import MEAN
    from counterflow.balance.kernels.homing import swap_homes

    assert placement.homes is not None
    homes, cluster = placement.homes, placement.cluster
    scaled = scale_forecasts(forecasts, cluster.ranks)
    # In the same unit as the price of a clone: the cost of the sending rank, divided by the number of ranks.
    price = move_price / horizon / cluster.ranks * MEAN * len(forecasts)
    node_of_rank = np.asarray(cluster.node_of_rank)
    slots = [_list_homes(row, cluster) for row in homes]
    start = [np.where(places == EMPTY, EMPTY, held[places]) for places, held in zip(slots, placement.experts, strict=True)]
    now, options = start, [homes]
    for most in _double_up_to(max(len(table) for table in start)):
        now = [
            swap_homes(np.ascontiguousarray(scaled[:, layer].T), start[layer], now[layer], most, price, node_of_rank)
            for layer in range(len(homes))
        ]
        options.append(np.stack([_find_homes(*pair) for pair in zip(now, slots, strict=True)]))
    return np.stack(options)


def _count_most(ranks: Array) -> int:
    """Return how often the most frequent of ``ranks`` occurs."""
    return int(np.bincount(ranks, minlength=1).max())


def _list_homes(homes: Array, cluster: Cluster) -> Array:
    """Return ``int64[columns, ranks]``: the home slots of each rank in order, `EMPTY` where a rank has fewer."""
    slots = np.sort(homes)
    ranks = cluster.rank_of_slot[slots]
    column = np.arange(len(slots)) - np.searchsorted(ranks, ranks)
    table = np.full((column.max(initial=0) + 1, cluster.ranks), EMPTY)
    table[column, ranks] = slots
    return table


def _find_homes(held: Array, slots: Array) -> Array:
    """Return ``int64[experts]``: the slot of each expert of ``held[columns, ranks]``."""
    homes = np.empty(np.count_nonzero(held != EMPTY), np.int64)
    homes[held[held != EMPTY]] = slots[held != EMPTY]
    return homes


def place_homes(homes: Array, cluster: Cluster) -> Array:
    """Return ``int64[layers, slots]``: experts in their homes, all other slots empty."""
    experts = np.full((len(homes), cluster.slots), EMPTY)
    np.put_along_axis(experts, homes, np.arange(homes.shape[1])[None], 1)
    return experts


def _double_up_to(columns: int) -> list[int]:
    """Return 1, 2, 4, ... below ``columns``, and ``columns``."""
    return [1 << power for power in range((columns - 1).bit_length())] + [columns]
