"""Clones around fixed homes: near the best there is, few moves, none without a gain."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.clones import plan_clones
from counterflow.balance.cluster import Cluster
from counterflow.balance.moves import plan_moves
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, measure_balancedness, sum_by_rank
from counterflow.balance.reference import plan_clones_best
from counterflow.balance.replay import METHODS, replay_trace
from counterflow.balance.split import split_tokens
from counterflow.errors import BalanceError


def find_slowest(counts: Array, placement: Placement) -> Array:
    return np.asarray(sum_by_rank(split_tokens(counts, placement), placement.cluster).max(1))


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_homes_stay_and_clones_are_of_use(ranks: int, own: int, spare: int, forecasts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    before = make_home_placement(2, ranks * own, ranks, spare)
    loads = random.lognormal(0, 1, (forecasts, 2, ranks * own)) * 1000 * (random.random((forecasts, 2, ranks * own)) < 0.8)
    plan = plan_clones(loads, before)
    assert before.homes is not None
    held = np.take_along_axis(plan.placement.experts, before.homes, 1)
    assert (held == np.arange(ranks * own)).all(), "a home changed"
    for layer in plan.placement.experts:
        for slots in layer.reshape(ranks, -1):
            filled = slots[slots != EMPTY].tolist()
            assert len(set(filled)) == len(filled), "a clone of an expert that the rank has"
    assert (plan.after <= plan.before + 1e-9).all() and (plan.after >= 1 - 1e-9).all()
    again = plan_clones(loads, plan.placement)
    np.testing.assert_allclose(again.before, plan.after, rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_small_plans_are_near_the_best_of_all_clones(seed: int) -> None:
    random = np.random.default_rng(seed)
    gaps = []
    for _ in range(12):
        before = make_home_placement(1, 6, 3, 1)
        counts = np.rint(random.lognormal(0, 1, (1, 6)) * 100).astype(np.int64)
        slowest = find_slowest(counts, plan_clones(counts, before, move_price=0.0).placement)
        gaps.append(float(slowest[0]) / plan_clones_best(counts[0], before))
    assert min(gaps) >= 1, "better than the best of all: the reference or the split is wrong"
    assert np.mean(gaps) < 1.01 and max(gaps) < 1.1


def test_loads_that_do_not_change_move_nothing() -> None:
    random = np.random.default_rng(1)
    loads = random.lognormal(0, 1, (6, 64)) * 1000
    first = plan_clones(loads, make_home_placement(6, 64, 8, 1)).placement
    for _ in range(3):
        second = plan_clones(loads, first).placement
        assert plan_moves(first, second).count == 0
        first = second


def test_a_plan_is_taken_only_where_it_gains_more_than_it_costs() -> None:
    random = np.random.default_rng(2)
    before = make_home_placement(4, 64, 8, 1)
    loads = random.lognormal(0, 1, (4, 64)) * 1000
    sent = [plan_moves(before, plan_clones(loads, before, horizon, 10.0).placement).count for horizon in (1, 10, 100, 10000)]
    assert sent[0] == 0 and sent == sorted(sent) and sent[-1] > 4 * 4
    even = np.full((4, 64), 100.0)
    assert plan_moves(before, plan_clones(even, before).placement).count == 0, "nothing to gain"


def test_clones_stay_on_their_node_where_traffic_is_dear() -> None:
    random = np.random.default_rng(3)
    loads = random.lognormal(0, 1.2, (6, 32)) * 1000
    before = make_home_placement(6, 32, 8, 1, nodes=2)

    def count_away(weight: float) -> int:
        placement = plan_clones(loads, before, move_price=0.0, traffic_weight=weight).placement
        tokens = split_tokens(np.rint(loads).astype(np.int64), placement)
        assert before.homes is not None
        home_node = before.cluster.node_of_slot[np.take_along_axis(before.homes, np.maximum(placement.experts, 0), 1)]
        return int(tokens[home_node != before.cluster.node_of_slot].sum())

    assert count_away(5.0) < count_away(0.0)


@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_the_time_expected_is_that_of_the_split_that_will_be_used(weight: float) -> None:
    before = make_home_placement(6, 64, 16, 2, nodes=4)
    loads = np.random.default_rng(8).lognormal(0, 1, (4, 6, 64)) * 1000
    plan = plan_clones(loads, before, traffic_weight=weight)
    again = plan_clones(loads, plan.placement, traffic_weight=weight)
    np.testing.assert_allclose(again.before, plan.after, rtol=1e-12)
    assert (plan.after <= plan.before).all()


def test_ranks_may_have_different_numbers_of_spare_slots() -> None:
    cluster = Cluster((3, 2, 4), (0, 0, 0))
    before = Placement(cluster, np.array([[0, 1, -1, 2, 3, 4, 5, -1, -1]]), np.array([[0, 1, 3, 4, 5, 6]]))
    counts = np.array([[900, 100, 400, 300, 10, 20]])
    after = plan_clones(counts, before).placement
    assert find_slowest(counts, after)[0] < 700 and after.experts[0, 3:5].tolist() == [2, 3]


def test_several_forecasts_bring_more_than_their_mean_when_loads_are_noisy() -> None:
    random = np.random.default_rng(4)
    base = random.lognormal(0, 1, (8, 64)) * 200
    seen, coming = random.poisson(base * random.lognormal(0, 0.3, (2, 16, 8, 64)))
    before = make_home_placement(8, 64, 8, 1)

    def score(forecasts: Array) -> float:
        placement = plan_clones(forecasts, before).placement
        return float(
            np.mean([measure_balancedness(sum_by_rank(split_tokens(counts, placement), before.cluster)) for counts in coming])
        )

    assert score(seen[:8]) > score(seen.mean(0)) + 0.01


@pytest.mark.parametrize(
    ("shape", "homes", "said"),
    [
        ((2, 8), True, "forecasts of shape"),
        ((1, 9), True, "forecasts of shape"),
        ((0, 1, 8), True, "forecasts of shape"),
        ((1, 8), False, "without homes"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], homes: bool, said: str) -> None:
    placement = make_home_placement(1, 8, 4, 1)
    if not homes:
        placement = Placement(placement.cluster, placement.experts)
    with pytest.raises(BalanceError, match=said):
        plan_clones(np.ones(shape), placement)


@pytest.mark.parametrize(
    ("load", "horizon", "price"),
    [(-1.0, 8, 0.1), (np.nan, 8, 0.1), (1e308, 8, 0.1), (1.0, 0, 0.1), (1.0, np.nan, 0.1), (1.0, 8, -1.0), (1.0, 8, np.nan)],
)
def test_numbers_that_cannot_be_are_refused(load: float, horizon: Any, price: float) -> None:
    with pytest.raises(BalanceError, match="allowed"):
        plan_clones(np.full((1, 8), load), make_home_placement(1, 8, 4, 1), horizon, price)


def test_a_replay_plans_from_the_past_alone() -> None:
    random = np.random.default_rng(5)
    counts = random.poisson(random.lognormal(0, 1, (2, 16)) * 100, (30, 2, 16))
    whole = replay_trace(counts, 4, 1, 3, warmup=10)
    cut = replay_trace(counts[:20], 4, 1, 3, warmup=10)
    changed = counts.copy()
    changed[20:] = counts[20:][:, :, ::-1]
    other = replay_trace(changed, 4, 1, 3, warmup=10)
    for method in ("fixed", "eplb", "counterflow"):
        assert (whole.balancedness[method][:10] == cut.balancedness[method]).all()
        assert (whole.balancedness[method][:10] == other.balancedness[method][:10]).all(), f"{method} saw what was to come"
    assert whole.first == 10 and whole.balancedness["oracle"].shape == (20, 2)
    assert not whole.moves[np.arange(20) % 3 != 0].any(), "moves between plans"
    assert (whole.loads.sum(2) == counts[10:].sum(2)).all() and (whole.fixed_loads.sum(2) == counts[10:].sum(2)).all()


def test_a_replay_bears_micro_batches_without_tokens() -> None:
    counts = np.random.default_rng(6).poisson(50.0, (12, 2, 8))
    counts[4] = counts[8, 1] = 0
    done = replay_trace(counts, 4, 1, warmup=4)
    assert (done.balancedness["counterflow"][0] == 1).all() and all(
        np.isfinite(scores).all() for scores in done.balancedness.values()
    )


@pytest.mark.parametrize(("interval", "warmup", "said"), [(0, 4, "interval 0"), (1, 12, "warm-up of 12"), (1, 0, "warm-up of 0")])
def test_a_replay_that_cannot_be_is_refused(interval: int, warmup: int, said: str) -> None:
    with pytest.raises(BalanceError, match=said):
        replay_trace(np.ones((12, 1, 8), np.int64), 4, 1, interval, warmup=warmup)


def test_on_recorded_routing(shared_data: Path) -> None:
    with np.load(shared_data / "routing_a.npz") as recorded:
        done = replay_trace(recorded["counts"].astype(np.int64), 8, 1)
    mean = {method: float(done.balancedness[method].mean()) for method in METHODS}
    assert mean["fixed"] == pytest.approx(0.58, abs=0.01) and 0.8 < mean["eplb"] < 0.9
    assert mean["counterflow"] >= 0.99 and np.percentile(done.balancedness["counterflow"], 5) >= 0.97
    assert mean["oracle"] >= mean["counterflow"]
    assert done.moves.mean() < 0.6, "clones sent per layer and micro-batch"
