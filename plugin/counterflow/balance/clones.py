"""Plan clones with fixed homes: choose the expert of each clone slot from forecasts of the next loads."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.loads import LARGEST_LOAD
from counterflow.balance.placement import Placement
from counterflow.balance.planning import TRAFFIC_WEIGHT
from counterflow.errors import BalanceError

# The time in which a rank sends one expert, as a share of the time in which it computes the experts of a micro-batch; and the
# number of micro-batches for which a clone is sent.
MOVE_PRICE = 0.1
HORIZON = 8


@dataclass(frozen=True)
class ClonePlan:
    """A placement, and the time that is expected of each layer's slowest rank, off-node traffic included.

    ``before`` is that time with the old placement, ``after`` with the new one: ``float64[layers]``, in units of the mean rank's
    load. No placement has less than 1.
    """

    placement: Placement
    before: Array
    after: Array


def plan_clones(
    forecasts: Array,
    placement: Placement,
    horizon: int = HORIZON,
    move_price: float = MOVE_PRICE,
    traffic_weight: float = TRAFFIC_WEIGHT,
    far_price: float | None = None,
) -> ClonePlan:
    """Return which clones each rank should hold next, judged by the token split that will be used with them.

    ``forecasts``, ``[forecasts, layers, experts]``, are equally likely loads of the next micro-batches; ``[layers, experts]`` is
    a single forecast. ``placement`` has the homes, which stay, and the clones so far. A clone that has to be sent costs its rank
    ``move_price`` of a micro-batch's time, once, or ``far_price`` (``move_price`` where not given) if its home is on another
    node. It must save the slowest rank more than that within ``horizon`` micro-batches,
    so nothing moves if loads do not change. A token computed off the node of its expert's home costs ``traffic_weight`` of a
    token, divided by the number of ranks. Raises `BalanceError` for forecasts that do not fit, or a placement without homes.
    """
    from counterflow.balance.kernels.cloning import Layer, plan_layer

    homes_of_layer, forecasts = check_forecasts(forecasts, placement)
    check_prices(horizon, move_price, traffic_weight)
    cluster = placement.cluster
    scaled = scale_forecasts(forecasts, cluster.ranks)
    node_of_rank = np.asarray(cluster.node_of_rank)
    price = move_price / horizon / cluster.ranks
    far = price if far_price is None else far_price / horizon / cluster.ranks
    traffic = traffic_weight if cluster.nodes > 1 else 0.0
    plans = []
    for layer, (held, homes) in enumerate(zip(placement.experts, homes_of_layer, strict=True)):
        spare = np.setdiff1d(np.arange(cluster.slots), homes)
        loads = np.ascontiguousarray(scaled[:, layer])
        plans.append(
            plan_layer(
                Layer(loads, cluster.rank_of_slot, cluster.rank_start, node_of_rank, homes, spare, price, far, traffic), held
            )
        )
    experts, before, after = zip(*plans, strict=True)
    return ClonePlan(Placement(cluster, np.stack(experts), placement.homes), np.array(before), np.array(after))


def check_forecasts(forecasts: Array, placement: Placement) -> tuple[Array, Array]:
    """Return the placement's homes, ``int64[layers, experts]``, and ``float64[forecasts, layers, experts]``.

    Raises `BalanceError` for forecasts that do not fit the placement, or a placement without homes.
    """
    forecasts = np.asarray(forecasts, np.float64)
    forecasts = forecasts[None] if forecasts.ndim == 2 else forecasts
    if placement.homes is None:
        raise BalanceError("a placement without homes; allowed: one with homes, use plan_placement for the rest")
    if forecasts.ndim != 3 or forecasts.shape[1:] != placement.homes.shape or not forecasts.size:
        raise BalanceError(
            f"forecasts of shape {forecasts.shape}; allowed: [forecasts, layers, experts], "
            f"layers and experts as in the placement, {placement.homes.shape}"
        )
    # Written so that a NaN is refused.
    if not ((forecasts >= 0) & (forecasts <= LARGEST_LOAD)).all():
        raise BalanceError(f"forecasts from {forecasts.min()} to {forecasts.max()}; allowed: loads from 0 to {LARGEST_LOAD:g}")
    return placement.homes, forecasts


def check_prices(horizon: int, move_price: float, traffic_weight: float) -> None:
    """Raise `BalanceError` for a horizon, a move price or a traffic weight out of bounds."""
    if not horizon >= 1 or not 0 <= move_price < np.inf or not 0 <= traffic_weight < np.inf:
        raise BalanceError(
            f"horizon {horizon}, move price {move_price}, traffic weight {traffic_weight}; "
            "allowed: a horizon of 1 or more, the others 0 or more"
        )


def scale_forecasts(forecasts: Array, ranks: int) -> Array:
    """Return loads ``int64[forecasts, layers, experts]``, scaled in each layer so that the mean rank has `cloning.MEAN`."""
    from counterflow.balance.kernels.cloning import MEAN

    totals = forecasts.sum(2, keepdims=True)
    scaled: Array = np.rint(forecasts * (ranks * MEAN) / np.where(totals > 0, totals, 1)).astype(np.int64)
    return scaled
