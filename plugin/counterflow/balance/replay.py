"""Replay recorded routing: plan from past micro-batches only, and score the plan on the next ones."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.clones import plan_clones
from counterflow.balance.cluster import Cluster
from counterflow.balance.costs import Costs
from counterflow.balance.placement import Placement, make_home_placement, measure_balancedness, share_evenly, sum_by_rank
from counterflow.balance.split import split_tokens
from counterflow.balance.tiers import FORECASTS, PLANS, STEP, TIERS, Run, follow_plan
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

METHODS = ("fixed", "eplb", "counterflow", "oracle")
# The number of past micro-batches from which EPLB plans.
EPLB_WINDOW = 50


@dataclass(frozen=True)
class Account:
    """What a plan, one of `PLANS`, takes and gives by ``costs``, over T scored micro-batches and L layers.

    ``times[method]``: ``float64[T, L]``, seconds of the slowest rank, under counterflow with what clones and moves add to it;
    ``ideal``, ``float64[T, L]``: seconds with as many tokens on every rank. ``sent[tier]``: ``int64[T, L, 2]``, what travelled
    within nodes and between nodes, and ``early``, ``int64[2]``, homes that moved before the first scored micro-batch, both as in
    `tiers.Followed`.
    """

    plan: str
    costs: Costs
    times: dict[str, Array]
    ideal: Array
    sent: dict[str, Array]
    early: Array

    def sum_bytes(self) -> dict[str, Array]:
        """Return ``float64[2]`` for each of `TIERS`: bytes sent for scored micro-batches, within nodes and between nodes."""
        return {tier: count.sum((0, 1)) * (TIERS[tier] * self.costs.expert_bytes) for tier, count in self.sent.items()}

    def share_of_ideal(self, method: str) -> float:
        """Return the share of force-balanced: the time with as many tokens on every rank over that of a method."""
        spent = float(self.times[method].sum())
        return float(self.ideal.sum()) / spent if spent > 0 else 1.0


@dataclass(frozen=True)
class Replay:
    """The results of a replay, over T scored micro-batches, L layers, R ranks.

    ``first``: the index in the trace of the first scored micro-batch. ``balancedness[method]``: ``float64[T, L]``, a method being
    one of `METHODS`. ``fixed_loads`` and ``loads``: ``int64[T, L, R]``, tokens per rank with fixed homes and with counterflow's
    placement. ``moves``: ``int64[T, L]``, experts that counterflow sent for that micro-batch to ranks that had not held them,
    ``off_node_moves`` of them from another node. ``account``: what that took, where it was counted.
    """

    cluster: Cluster
    first: int
    balancedness: dict[str, Array]
    fixed_loads: Array
    loads: Array
    moves: Array
    off_node_moves: Array
    account: Account | None = None


def replay_trace(
    counts: Array,
    ranks: int,
    clones_per_rank: int,
    interval: int = 1,
    nodes: int = 1,
    warmup: int | None = None,
    plan: str = "predicted",
    rehome: bool | None = None,
    step: int = STEP,
    shared: int = 1,
    costs: Costs | None = None,
) -> Replay:
    """Plan every ``interval`` micro-batches from the past of a recorded run, and score each plan on the micro-batches after it.

    ``counts`` is ``int64[micro-batches, layers, experts]``. There are four methods. ``fixed`` has homes only. ``eplb`` is
    DeepSeek's plan from the sum of the past 50 micro-batches: all experts move freely, and copies share evenly. ``counterflow``
    splits tokens exactly among homes and clones, by one of `PLANS`: ``predicted`` plans resident clones from forecasts;
    ``exact`` plans just-in-time clones, ``shared`` slots of each rank, from a micro-batch's own counts; ``auto`` has both, and
    uses a clone where it saves more time than it costs by ``costs`` (those of a DeepSeek-V3 expert on H100 nodes if not given).
    With ``rehome``, homes move as a step of ``step`` micro-batches begins, if that pays; they do by default under ``exact`` and
    ``auto``. ``oracle`` plans resident clones from the coming loads in place of forecasts, with free moves. The first ``warmup``
    micro-batches (50, or half of a short trace) are observed and not scored. Raises `BalanceError` for a trace or numbers that
    cannot work.
    """
    if len(counts) < 2:
        raise BalanceError(f"a trace of {len(counts)} micro-batches; allowed: 2 or more, those to plan from and those to score")
    first = min(50, len(counts) // 2) if warmup is None else warmup
    take_whole(interval, "interval", 1, error=BalanceError)
    if not 1 <= take_whole(first, "warm-up", error=BalanceError) < len(counts):
        raise BalanceError(f"a warm-up of {first} of the trace's {len(counts)} micro-batches; allowed: 1 to {len(counts) - 1}")
    if plan not in PLANS:
        raise BalanceError(f"plan {plan!r}; allowed: {', '.join(PLANS)}")
    take_whole(step, "step", 1, error=BalanceError)
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
    costs = costs or Costs()
    moves_homes = plan != "predicted" if rehome is None else rehome
    followed = follow_plan(counts, first, homes, Run(plan, moves_homes, interval, step, shared, costs))
    foreseen, theirs = _foresee(counts, first, interval, homes), _follow_eplb(counts, first, interval, homes.cluster)
    ideal = scored.sum(2) / ranks * costs.token_time
    return Replay(
        cluster=homes.cluster,
        first=first,
        balancedness={
            "fixed": measure_balancedness(fixed),
            "eplb": theirs,
            "counterflow": measure_balancedness(followed.loads),
            "oracle": foreseen,
        },
        fixed_loads=fixed,
        loads=followed.loads,
        moves=followed.moved.sum(2),
        off_node_moves=followed.moved[:, :, 1],
        account=Account(
            plan=plan,
            costs=costs,
            times={
                "fixed": ideal / measure_balancedness(fixed),
                "eplb": ideal / theirs,
                "counterflow": followed.times,
                "oracle": ideal / foreseen,
            },
            ideal=ideal,
            sent=followed.sent,
            early=followed.early,
        ),
    )


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
