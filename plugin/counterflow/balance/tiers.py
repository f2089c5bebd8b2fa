"""Follow a recorded run under a plan of three tiers: resident clones, just-in-time clones, homes that move."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.clones import HORIZON, plan_clones
from counterflow.balance.costs import HOME, JUST_IN_TIME, RESIDENT, Costs
from counterflow.balance.exact import FREE, add_shared_slots, plan_exact
from counterflow.balance.gate import ERRORS, count_moves, settle_homes, time_moves
from counterflow.balance.homes import place_homes
from counterflow.balance.moves import keep_slots, plan_moves
from counterflow.balance.placement import EMPTY, Placement, sum_by_rank
from counterflow.balance.prediction import LoadPredictor
from counterflow.balance.split import split_tokens

STEP = 8
"""Micro-batches of a step, where nothing else is said."""
PLANS = ("predicted", "exact", "auto")
TIERS = {"resident": RESIDENT, "just_in_time": JUST_IN_TIME, "homes": HOME}
# The number of forecasts for a plan of resident clones.
FORECASTS = 8
# So many more are made under ``auto``, in the place of rare ones.
SPARE_FORECASTS = 2
# What a token computed off its home's node costs resident clones under ``auto``: less than where they carry everything.
TRAFFIC_WEIGHT = 0.05


@dataclass(frozen=True)
class Run:
    """How a run is followed: its plan, whether homes move, micro-batches from plan to plan and of a step, shared slots, costs."""

    plan: str
    rehome: bool
    interval: int
    step: int
    shared: int
    costs: Costs


@dataclass(frozen=True)
class Followed:
    """What came of a plan, over T scored micro-batches, L layers, R ranks.

    ``loads``: ``int64[T, L, R]``, tokens per rank. ``sent[tier]``: ``int64[T, L, 2]``, clones or homes of one of `TIERS` that
    travelled for that micro-batch, within a node and between nodes; resident ones all travel as a step begins, since the
    optimizer has changed the weights. ``early``: ``int64[2]``, homes that moved before the first scored micro-batch. ``moved``:
    ``int64[T, L, 2]``, all clones and homes that were not where they had been, near and far. ``times``: ``float64[T, L]``,
    seconds of the slowest rank with what clones and moves add to it.
    """

    loads: Array
    sent: dict[str, Array]
    early: Array
    moved: Array
    times: Array


def follow_plan(counts: Array, first: int, placement: Placement, run: Run) -> Followed:
    """Follow ``counts``, ``int64[micro-batches, layers, experts]``, from ``placement`` on; score what comes from ``first`` on.

    A step begins at ``first``. Homes may move as a step begins, in the warm-up too. Resident clones are planned at ``first`` and
    every ``run.interval`` micro-batches after it, from what was seen before.
    """
    predictor = LoadPredictor(placement.layers, counts.shape[2], run.interval)
    # Without resident clones, homes carry all that stays; a move that turns out to be chance costs little beside the clones.
    errors = 0.0 if run.plan == "exact" else ERRORS
    rows: list[tuple[Array, ...]] = []
    early = np.zeros(2, np.int64)
    for index, seen in enumerate(counts):
        begins, before = (index - first) % run.step == 0, placement
        if run.rehome and begins:
            placement = settle_homes(counts[:index], placement, run.step, run.costs, partial(judge_homes, run), errors)
        went = count_moves(before, placement).sum(1)
        if index < first:
            early += went.sum(0)
        else:
            if run.plan != "exact" and ((index - first) % run.interval == 0 or went.any()):
                placement = plan_residents(predictor.forecast(FORECASTS + SPARE_FORECASTS), placement, run, begins=begins)
            loads, fresh = compute(seen, placement, run)
            resident = count_clones(placement)
            sent = resident if begins else count_clones(placement, before)
            time = time_layers(loads, fresh, resident, run) + time_moves(before, placement, run.costs)
            rows.append((loads, time, _count_transfers(before, placement) + fresh, sent, fresh, went))
        predictor.observe(seen)
    loads, times, moved, *tiers = (np.stack(column) for column in zip(*rows, strict=True))
    return Followed(loads, dict(zip(TIERS, tiers, strict=True)), early, moved, times)


def plan_residents(forecasts: Array, placement: Placement, run: Run, *, begins: bool) -> Placement:
    """Return ``placement`` with the clones that stay until the next plan.

    Under ``auto``, clones of a step that ``begins`` all have to be sent, and each costs what a transfer does that is not hidden.
    Forecasts of rare loads are left out, since just-in-time clones serve them.
    """
    if run.plan == "predicted":
        plan = plan_clones(forecasts[:FORECASTS], placement, max(HORIZON, run.interval))
        return keep_slots(placement, plan.placement)
    assert placement.homes is not None
    cluster, costs = placement.cluster, run.costs
    bare = Placement(cluster, place_homes(placement.homes, cluster), placement.homes) if begins else placement
    usual = leave_out_rare(forecasts, FORECASTS)
    mean = max(float(usual.sum(2).mean()) / cluster.ranks, 1.0) * costs.token_time
    near, far = (costs.exposed * costs.time_transfer(RESIDENT, is_far=is_far) / mean for is_far in (False, True))
    return keep_slots(placement, plan_clones(usual, bare, run.step, near, TRAFFIC_WEIGHT, far).placement)


def leave_out_rare(forecasts: Array, count: int) -> Array:
    """Return ``count`` forecasts, those of each layer that are no more than twice as far from the median as half of them are.

    ``forecasts``, ``float64[forecasts, layers, experts]``. Where fewer are left, they are repeated in turn; where fewer than
    four were given, they are returned as they are.
    """
    if len(forecasts) < 4:
        return forecasts
    away = np.abs(forecasts - np.median(forecasts, 0)).sum(2)
    usual = away <= 2 * np.median(away, 0)
    kept = [forecasts[np.resize(np.flatnonzero(usual[:, layer]), count), layer] for layer in range(forecasts.shape[1])]
    return np.stack(kept, 1)


def compute(counts: Array, placement: Placement, run: Run) -> tuple[Array, Array]:
    """Return the tokens of each rank in a micro-batch, ``int64[layers, ranks]``, and its just-in-time clones, ``[layers, 2]``."""
    if run.plan == "predicted":
        return sum_by_rank(split_tokens(counts, placement), placement.cluster), np.zeros((placement.layers, 2), np.int64)
    wide, shared = add_shared_slots(placement, run.shared)
    prices = FREE if run.plan == "exact" else run.costs.price_clones(placement.cluster.ranks)
    plan = plan_exact(counts, wide, shared, prices)
    return sum_by_rank(plan.tokens, wide.cluster), np.stack((plan.near, plan.far), 1)


def judge_homes(run: Run, found: Array, judged: Array, placement: Placement) -> Array:
    """Return ``float64[samples, layers]``: seconds of each micro-batch of ``judged``, with clones planned from ``found``."""
    if run.plan != "exact":
        placement = plan_residents(found.astype(np.float64), placement, run, begins=True)
    resident = count_clones(placement)
    return np.stack([time_layers(*compute(counts, placement, run), resident, run) for counts in judged])


def time_layers(loads: Array, fresh: Array, resident: Array, run: Run) -> Array:
    """Return ``float64[layers]``: seconds of the slowest rank, and what clones that travel add to it.

    ``loads[layers, ranks]``; ``fresh`` and ``resident``, ``[layers, 2]``: just-in-time and resident clones, near and far.
    """
    costs, ranks = run.costs, loads.shape[1]
    now = np.array([costs.time_clone(is_far=is_far) for is_far in (False, True)])
    step = np.array([costs.exposed * costs.time_transfer(RESIDENT, is_far=is_far) for is_far in (False, True)])
    times: Array = loads.max(1) * costs.token_time + (fresh @ now + resident @ step / run.step) / ranks
    return times


def count_clones(placement: Placement, old: Placement | None = None) -> Array:
    """Return ``int64[layers, 2]``: clones whose home is on their own node, and on another; none that ``old`` has there."""
    assert placement.homes is not None
    cluster = placement.cluster
    is_clone = placement.experts != EMPTY
    np.put_along_axis(is_clone, placement.homes, False, 1)
    if old is not None:
        is_clone &= placement.experts != old.experts
    layer, slot = np.nonzero(is_clone)
    home = placement.homes[layer, placement.experts[layer, slot]]
    clones = np.zeros((placement.layers, 2), np.int64)
    np.add.at(clones, (layer, (cluster.node_of_slot[slot] != cluster.node_of_slot[home]).astype(np.int64)), 1)
    return clones


def _count_transfers(old: Placement, new: Placement) -> Array:
    """Return ``int64[layers, 2]``: what was not on its rank before, from its own node and from another."""
    moves = plan_moves(old, new)
    return np.stack([np.bincount(moves.layer[moves.off_node == is_far], minlength=new.layers) for is_far in (False, True)], 1)
