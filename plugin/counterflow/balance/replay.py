"""Replay recorded routing: plan from past micro-batches only, and score the plan on the next ones."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.clones import HORIZON, plan_clones
from counterflow.balance.cluster import Cluster
from counterflow.balance.moves import keep_slots, plan_moves
from counterflow.balance.placement import Placement, make_home_placement, measure_balancedness, share_evenly, sum_by_rank
from counterflow.balance.prediction import LoadPredictor
from counterflow.balance.split import split_tokens
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

METHODS = ("fixed", "eplb", "counterflow", "oracle")
# The number of forecasts for a plan, and the number of past micro-batches from which EPLB plans.
FORECASTS = 8
EPLB_WINDOW = 50


@dataclass(frozen=True)
class Replay:
    """The results of a replay, over T scored micro-batches, L layers, R ranks.

    ``first``: the index in the trace of the first scored micro-batch. ``balancedness[method]``: ``float64[T, L]``, a method being
    one of `METHODS`. ``fixed_loads`` and ``loads``: ``int64[T, L, R]``, tokens per rank with fixed homes and with counterflow's
    placement. ``moves``: ``int64[T, L]``, clones that counterflow sent before that micro-batch, ``off_node_moves`` of them from
    another node.
    """

    cluster: Cluster
    first: int
    balancedness: dict[str, Array]
    fixed_loads: Array
    loads: Array
    moves: Array
    off_node_moves: Array


def replay_trace(
    counts: Array,
    ranks: int,
    clones_per_rank: int,
    interval: int = 1,
    nodes: int = 1,
    warmup: int | None = None,
) -> Replay:
    """Plan every ``interval`` micro-batches from the past of a recorded run, and score each plan on the micro-batches after it.

    ``counts`` is ``int64[micro-batches, layers, experts]``. There are four methods. ``fixed`` has homes only. ``eplb`` is
    DeepSeek's plan from the sum of the past 50 micro-batches: all experts move freely, and copies share evenly. ``counterflow``
    keeps homes, plans clones from forecasts, and splits tokens exactly. ``oracle`` is the same planner with the coming loads in
    place of forecasts, and with free moves. The first ``warmup`` micro-batches (50, or half of a short trace) are observed and
    not scored. Raises `BalanceError` for a trace or numbers that cannot work.
    """
    if len(counts) < 2:
        raise BalanceError(f"a trace of {len(counts)} micro-batches; allowed: 2 or more, those to plan from and those to score")
    first = min(50, len(counts) // 2) if warmup is None else warmup
    take_whole(interval, "interval", 1, error=BalanceError)
    if not 1 <= take_whole(first, "warm-up", error=BalanceError) < len(counts):
        raise BalanceError(f"a warm-up of {first} of the trace's {len(counts)} micro-batches; allowed: 1 to {len(counts) - 1}")
    # A plan lasts no longer than the trace, so nothing is predicted beyond it.
    interval = min(interval, len(counts))
    _, layers, experts = counts.shape
    homes = make_home_placement(layers, experts, ranks, clones_per_rank, nodes)
    # One rank alone has nothing to clone, whatever its slots.
    others = experts - experts // ranks
    if clones_per_rank > others > 0:
        raise BalanceError(f"{clones_per_rank} clones per rank; allowed: 0 to {others}, the experts whose home is elsewhere")
    scored = counts[first:]
    fixed = scored.reshape(len(scored), layers, ranks, -1).sum(-1)
    loads, moves, off_node = _follow_clones(counts, first, interval, homes)
    return Replay(
        cluster=homes.cluster,
        first=first,
        balancedness={
            "fixed": measure_balancedness(fixed),
            "eplb": _follow_eplb(counts, first, interval, homes.cluster),
            "counterflow": measure_balancedness(loads),
            "oracle": _foresee(counts, first, interval, homes),
        },
        fixed_loads=fixed,
        loads=loads,
        moves=moves,
        off_node_moves=off_node,
    )


def _follow_clones(counts: Array, first: int, interval: int, placement: Placement) -> tuple[Array, Array, Array]:
    """Return, for each micro-batch, the tokens per rank, the clones sent, and how many of these came from another node."""
    predictor = LoadPredictor(placement.layers, counts.shape[2], interval)
    for seen in counts[:first]:
        predictor.observe(seen)
    loads, moved, off_node = [], [], []
    for index, seen in enumerate(counts[first:]):
        sent = far = np.zeros(placement.layers, np.int64)
        if index % interval == 0:
            plan = plan_clones(predictor.forecast(FORECASTS), placement, max(HORIZON, interval))
            planned = keep_slots(placement, plan.placement)
            moves = plan_moves(placement, planned)
            sent = np.bincount(moves.layer, minlength=placement.layers)
            far = np.bincount(moves.layer[moves.off_node], minlength=placement.layers)
            placement = planned
        loads.append(sum_by_rank(split_tokens(seen, placement), placement.cluster))
        moved.append(sent)
        off_node.append(far)
        predictor.observe(seen)
    return np.stack(loads), np.stack(moved), np.stack(off_node)


def _follow_eplb(counts: Array, first: int, interval: int, cluster: Cluster) -> Array:
    from counterflow.balance.kernels.deepseek import place_as_deepseek

    scores = []
    for start in range(first, len(counts), interval):
        past = counts[max(0, start - EPLB_WINDOW) : start].sum(0)
        experts, _, _ = place_as_deepseek(past, cluster.slots, 1, 1, cluster.ranks)
        coming = counts[start : start + interval]
        placed = Placement(cluster, experts)
        scores += [measure_balancedness(sum_by_rank(share_evenly(seen, placed), cluster)) for seen in coming]
    return np.stack(scores)


def _foresee(counts: Array, first: int, interval: int, placement: Placement) -> Array:
    scores = []
    for start in range(first, len(counts), interval):
        coming = counts[start : start + interval]
        # Evenly spread over what comes, as many as the planner weighs otherwise.
        picked = coming[np.linspace(0, len(coming) - 1, min(FORECASTS, len(coming))).astype(np.int64)]
        placement = plan_clones(picked, placement, move_price=0.0).placement
        scores += [measure_balancedness(sum_by_rank(split_tokens(seen, placement), placement.cluster)) for seen in coming]
    return np.stack(scores)
