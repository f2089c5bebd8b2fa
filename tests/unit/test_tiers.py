"""Plans of three tiers, followed over made-up loads: how balanced, at what traffic, and when homes move."""

import numpy as np
import pytest

from counterflow.arrays import Array
from counterflow.balance import Placement, make_home_placement, make_workload, replay_trace
from counterflow.balance.costs import Costs
from counterflow.balance.gate import count_moves, settle_homes, time_moves
from counterflow.balance.replay import Replay
from counterflow.balance.tiers import Run, compute, judge_homes, leave_out_rare
from counterflow.errors import BalanceError
from tests.support.running import refuses

# Kinds in which the load stands still, at least for a while: resident clones carry most of it.
STANDING = ("balanced", "hot_set", "hot_rank", "spread", "zero_ranks", "drift")


def replay(kind: str, plan: str, seed: int, **how: bool) -> Replay:
    return replay_trace(make_workload(kind, 112, 1, seed=seed), 8, 1, 8, 1, 48, plan, **how)


def score(done: Replay) -> tuple[float, float]:
    scores = done.balancedness["counterflow"]
    return float(scores.mean()), float(np.percentile(scores, 5))


def sum_bytes(done: Replay) -> float:
    assert done.account is not None
    return float(sum(row.sum() for row in done.account.sum_bytes().values()))


@pytest.mark.parametrize("kind", ["balanced", "zero_ranks", "rotating_step", "rotating_micro", "burst", "drift"])
def test_automatic_plans_are_balanced_at_a_quarter_of_the_traffic(kind: str) -> None:
    for seed in (11, 12):
        exact, auto = replay(kind, "exact", seed), replay(kind, "auto", seed)
        assert min(score(auto)) >= 0.985 and score(auto)[0] >= 0.99, f"seed {seed}: auto {score(auto)}"
        assert score(exact)[0] >= 0.99, f"seed {seed}: exact {score(exact)}"
        if kind in STANDING:
            assert sum_bytes(auto) <= 0.25 * sum_bytes(exact), f"seed {seed}"


def test_automatic_plans_lose_to_neither_of_the_others() -> None:
    for kind in ("hot_set", "rotating_step"):
        shares = {plan: replay(kind, plan, 5).account.share_of_ideal("counterflow") for plan in ("predicted", "exact", "auto")}  # type: ignore[union-attr]
        assert shares["auto"] >= max(shares.values()) - 0.002, f"{kind}: {shares}"


def test_ranks_without_load_get_work_only_when_homes_move() -> None:
    still, moving = (replay("zero_ranks", "exact", 3, rehome=rehome) for rehome in (False, True))
    assert score(still)[0] < 0.8 and score(moving)[0] > 0.99
    assert moving.account is not None and still.account is not None
    assert moving.account.early.sum() > 0 and still.account.early.sum() == 0


@pytest.mark.parametrize(
    ("kind", "moves"), [("zero_ranks", True), ("rotating_step", False), ("rotating_micro", False), ("hot_set", False)]
)
def test_homes_move_only_where_the_load_has_settled_elsewhere(kind: str, moves: bool) -> None:
    run = Run("auto", True, 8, 8, 1, Costs())
    for seed in (1, 2):
        placement = make_home_placement(1, 64, 8, 1)
        past = make_workload(kind, 64, 1, seed=seed)
        moved = settle_homes(past, placement, 8, run.costs, lambda *given: judge_homes(run, *given))
        assert count_moves(placement, moved).any() == moves, f"seed {seed}"


def test_homes_do_not_move_before_there_is_evidence_or_at_a_price_that_is_never_paid() -> None:
    past, placement = make_workload("zero_ranks", 64, 1), make_home_placement(1, 64, 8, 1)
    for costs, seen in ((Costs(), past[:24]), (Costs(node_speed=1e6), past)):
        run = Run("predicted", True, 8, 8, 1, costs)
        moved = settle_homes(seen, placement, 8, costs, lambda *given, run=run: judge_homes(run, *given))
        assert not count_moves(placement, moved).any()


def test_moves_of_homes_by_hand() -> None:
    old = make_home_placement(1, 4, 4, 0, 2)
    assert old.homes is not None
    # Experts 0 and 1 change places on a node, 2 and 3 on the other, or 1 and 2 between nodes.
    near, far = (Placement(old.cluster, np.array([row]), np.array([row])) for row in ([1, 0, 3, 2], [0, 2, 1, 3]))
    assert count_moves(old, near)[0].tolist() == [[1, 0]] * 4
    assert count_moves(old, far)[0].tolist() == [[0, 0], [0, 1], [0, 1], [0, 0]]
    costs = Costs(expert_bytes=1e9, node_speed=1e9, network_speed=1e8)
    assert time_moves(old, near, costs)[0] == pytest.approx(7) and time_moves(old, far, costs)[0] == pytest.approx(70)


def test_rare_loads_are_left_out_of_what_resident_clones_are_planned_for() -> None:
    random = np.random.default_rng(0)
    usual = 100 + random.normal(0, 3, (10, 2, 8))
    rare = usual.copy()
    rare[4, 1, 0] += 500
    kept = leave_out_rare(rare, 8)
    assert kept.shape == (8, 2, 8) and kept[:, 1].max() < 150
    assert np.array_equal(kept[:, 0], rare[:8, 0]), "a layer without rare loads keeps its forecasts"
    assert np.array_equal(leave_out_rare(rare[:3], 8), rare[:3])


def test_what_a_replay_accounts_for_adds_up() -> None:
    costs = Costs(expert_bytes=2e6, token_time=2e-6)
    done = replay_trace(make_workload("spread", 32, 2, seed=4), 8, 1, 4, 1, 16, "auto", step=4, costs=costs)
    account = done.account
    assert account is not None
    sums = account.sum_bytes()
    for tier, units in (("resident", 3), ("just_in_time", 4), ("homes", 7)):
        assert sums[tier].sum() == pytest.approx(units * 2e6 * account.sent[tier].sum())
    assert account.sent["resident"][::4].any() and not account.sent["resident"][1::4].any(), "clones travel as steps begin"
    slowest: Array = done.loads.max(2) * 2e-6
    assert (account.times["counterflow"] >= slowest - 1e-12).all()
    assert account.ideal == pytest.approx(done.loads.mean(2) * 2e-6)


def test_compute_uses_only_what_its_plan_allows() -> None:
    counts = make_workload("hot_set", 1, 1)[0]
    homes = make_home_placement(1, 64, 8, 1)
    for plan, clones in (("predicted", False), ("exact", True), ("auto", True)):
        loads, fresh = compute(counts, homes, Run(plan, False, 1, 8, 1, Costs()))
        assert bool(fresh.any()) == clones and loads.sum() == counts.sum()
    assert not compute(counts, homes, Run("exact", False, 1, 8, 0, Costs()))[1].any(), "no shared slot, no clone"


def test_plans_that_are_not_known_are_refused() -> None:
    with refuses("plan 'best'; allowed: predicted, exact, auto", BalanceError):
        replay_trace(make_workload("balanced", 8), 8, 1, plan="best")
    with refuses("step 0 given; allowed: a whole number from 1 up", BalanceError):
        replay_trace(make_workload("balanced", 8), 8, 1, step=0)
