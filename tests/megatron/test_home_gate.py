"""When homes move by themselves: as soon as the load has settled elsewhere, and not where nothing is gained."""

import numpy as np
import pytest

from counterflow.arrays import Array
from counterflow.balance.costs import Costs
from counterflow.balance.gate import LEAST_STEPS, MOST_STEPS
from counterflow.balance.placement import Placement, make_home_placement, measure_balancedness, sum_by_rank
from counterflow.balance.split import split_tokens
from counterflow.balance.workloads import make_workload
from counterflow.moe import planning
from counterflow.moe.planning import HomeGate, plan_next

EXPERTS, RANKS, STEP = 64, 8, 8


class Followed:
    """A gate that is given the steps of a workload: the steps after which homes moved, and balancedness in each step."""

    def __init__(self, counts: Array, clones: int, costs: Costs | None = None, plan: str = "predicted") -> None:
        gate, self.moved, self.scores = HomeGate(0.1, plan, 1, costs), list[int](), list[float]()
        placement = make_home_placement(counts.shape[1], EXPERTS, RANKS, clones)
        for number, step in enumerate(counts.reshape(-1, STEP, *counts.shape[1:]), 1):
            planned = plan_next(step[:1].astype(np.float64), placement, STEP, 0.1)
            self.scores.append(float(np.mean([score(seen, planned) for seen in step])))
            settled = gate.settle(step, step.astype(np.float64), STEP, placement)
            assert settled.homes is not None and placement.homes is not None
            if (settled.homes != placement.homes).any():
                self.moved.append(number)
            placement = settled


def score(counts: Array, placement: Placement) -> float:
    return float(measure_balancedness(sum_by_rank(split_tokens(counts, placement), placement.cluster)).mean())


@pytest.mark.parametrize("clones", [0, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_whose_experts_get_no_tokens_are_served_after_four_steps(clones: int, seed: int) -> None:
    run = Followed(make_workload("zero_ranks", 80, 2, EXPERTS, RANKS, seed=seed), clones)
    assert run.moved[0] == LEAST_STEPS and len(run.moved) <= 2
    assert max(run.scores[:LEAST_STEPS]) < 0.8 and min(run.scores[LEAST_STEPS:]) > 0.9


@pytest.mark.parametrize(("plan", "clones"), [("exact", 0), ("auto", 1)])
def test_they_are_served_beside_just_in_time_clones_too(plan: str, clones: int) -> None:
    run = Followed(make_workload("zero_ranks", 80, 2, EXPERTS, RANKS), clones, plan=plan)
    assert run.moved[0] == LEAST_STEPS


@pytest.mark.parametrize("kind", ["balanced", "rotating_step", "rotating_micro"])
def test_homes_stay_where_a_move_gains_nothing(kind: str) -> None:
    assert Followed(make_workload(kind, 120, 2, EXPERTS, RANKS), 1).moved == []


@pytest.mark.parametrize("seed", [0, 1])
def test_homes_stay_where_just_in_time_clones_leave_next_to_nothing_to_gain(seed: int) -> None:
    assert Followed(make_workload("balanced", 120, 2, EXPERTS, RANKS, seed=seed), 1, plan="auto").moved == []


def test_a_move_that_costs_more_than_it_gains_is_not_made() -> None:
    counts = make_workload("zero_ranks", 80, 2, EXPERTS, RANKS)
    assert Followed(counts, 0, Costs(node_speed=1e6, network_speed=1e6)).moved == []


def test_where_nothing_moves_the_gate_asks_ever_less(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stay(past: Array, placement: Placement, *_: object) -> Placement:
        asked.append(len(past) // STEP)
        return placement

    monkeypatch.setattr(planning, "settle_homes", stay)
    Followed(make_workload("balanced", 100 * STEP, 1, EXPERTS, RANKS), 0)
    # After 4, 12, 28, 60 and 92 steps, of which it knows the last 32.
    assert asked == [4, 12, 28, MOST_STEPS, MOST_STEPS]


def test_steps_of_another_size_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(planning, "settle_homes", lambda past, placement, *_: asked.append(past.shape) or placement)
    gate, placement = HomeGate(0.1), make_home_placement(1, EXPERTS, RANKS, 0)
    for size in (2, 2, 2, 3, 3, 3, 3):
        counts = np.ones((size, 1, EXPERTS), np.int64)
        gate.settle(counts, counts.astype(np.float64), size, placement)
    assert asked == [(12, 1, EXPERTS)], "four steps of three micro-batches"
