"""Just-in-time clones: what any plan has to keep, how near to the best it comes, what it costs, and what is refused."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance import Placement, make_home_placement, make_workload, measure_balancedness, plan_clones, sum_by_rank
from counterflow.balance.costs import Costs
from counterflow.balance.exact import FREE, ExactPlan, add_shared_slots, plan_exact
from counterflow.balance.placement import EMPTY
from counterflow.balance.reference import bound_split
from counterflow.balance.tiers import count_clones
from counterflow.errors import BalanceError
from tests.support.running import refuses

UNIT = 1024


def plan_best(counts: Array, placement: Placement, shared: Array, near: int, far: int) -> int:
    """The least cost, in 1024ths of a token, over all that the shared slots of a tiny layer may hold: slow and obvious."""
    assert placement.homes is not None
    cluster, (homes,) = placement.cluster, placement.homes
    experts, spare = placement.experts[0].copy(), np.flatnonzero(shared)
    best = 2**62
    for choice in product(range(EMPTY, len(counts)), repeat=len(spare)):
        experts[spare] = choice
        nodes = [
            (cluster.node_of_slot[slot], cluster.node_of_slot[homes[expert]]) for slot, expert in zip(spare, choice, strict=True)
        ]
        price = sum(near if own == other else far for (own, other), expert in zip(nodes, choice, strict=True) if expert != EMPTY)
        best = min(best, bound_split(counts, experts, cluster.rank_of_slot) * UNIT + price)
    return best


def find_cost(plan: ExactPlan, near: int, far: int) -> int:
    loads = sum_by_rank(plan.tokens, plan.placement.cluster)
    return int(loads.max()) * UNIT + int(plan.near.sum()) * near + int(plan.far.sum()) * far


def check_plan(counts: Array, before: Placement, shared: Array, plan: ExactPlan) -> None:
    """What a dispatcher needs: all tokens in slots of their expert, homes and resident clones where they were, none twice."""
    after, tokens = plan.placement.experts, plan.tokens
    assert plan.placement.homes is before.homes and (after[:, ~shared] == before.experts[:, ~shared]).all()
    assert tokens.min() >= 0 and not tokens[after == EMPTY].any()
    for layer, row in enumerate(counts):
        assert np.array_equal(np.bincount(after[layer][tokens[layer] > 0], tokens[layer][tokens[layer] > 0], len(row)), row)
        for rank in range(before.cluster.ranks):
            start, end = before.cluster.rank_start[rank : rank + 2]
            held = after[layer, start:end][after[layer, start:end] != EMPTY]
            assert len(set(held.tolist())) == len(held), f"layer {layer}: rank {rank} holds an expert twice"
    assert tokens[:, shared][after[:, shared] != EMPTY].all(), "a clone that computes nothing is sent"


@st.composite
def draw_layers(draw: st.DrawFn) -> tuple[Array, Placement, Array]:
    nodes, per_node, own = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ranks = nodes * per_node
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    scale = draw(st.sampled_from([0, 1, 50, 10**6, 2**40 // (ranks * own)]))
    counts = np.rint(random.lognormal(0, draw(st.sampled_from([0.1, 1.0, 3.0])), (2, ranks * own)) * scale).astype(np.int64)
    counts[:, random.random(ranks * own) < draw(st.sampled_from([0, 0.3]))] = 0
    resident = draw(st.integers(0, min(1, ranks * own - own)))
    placement = make_home_placement(2, ranks * own, ranks, resident, nodes)
    if resident:
        placement = plan_clones(random.lognormal(0, 1, (2, ranks * own)), placement, move_price=0.0).placement
    return counts, *add_shared_slots(placement, draw(st.integers(0, 2)))


@pytest.fixture(scope="module")
def compiled() -> None:
    """What cases are drawn with is compiled already: in a fresh installation that takes longer than drawing may."""
    plan_clones(np.ones((2, 4)), make_home_placement(2, 4, 2, 1))


@pytest.mark.usefixtures("compiled")
@given(draw_layers(), st.integers(1, 2**20), st.integers(1, 2**24))
@settings(max_examples=150)
def test_a_plan_can_be_dispatched_and_costs_no_more_than_none(case: tuple[Array, Placement, Array], near: int, far: int) -> None:
    counts, placement, shared = case
    none = plan_exact(counts, placement, np.zeros_like(shared))
    for prices in (FREE, (near, far)):
        plan = plan_exact(counts, placement, shared, prices)
        check_plan(counts, placement, shared, plan)
        clones = count_clones(plan.placement) - count_clones(placement)
        assert np.array_equal(clones, np.stack((plan.near, plan.far), 1))
        for layer in range(2):
            slowest, without = (int(sum_by_rank(one.tokens, placement.cluster)[layer].max()) for one in (plan, none))
            # What is free has a price that is next to nothing, and at least a 1024th of a token.
            paid = int(plan.near[layer]) * prices[0] + int(plan.far[layer]) * prices[1]
            assert slowest * UNIT + paid <= without * UNIT, f"layer {layer}: clones cost more than they save"


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("prices", [FREE, (3 * UNIT, 20 * UNIT)])
def test_tiny_plans_are_near_the_best_of_all(nodes: int, prices: tuple[int, int]) -> None:
    """Of 15 random layers of four experts on four ranks, a few percent above the best that any clones could cost."""
    over = []
    for seed in range(15):
        random = np.random.default_rng([seed, nodes])
        placement, shared = add_shared_slots(make_home_placement(1, 4, 4, 0, nodes), 1)
        counts = random.integers(0, 100, 4)
        plan = plan_exact(counts[None], placement, shared, prices)
        best = plan_best(counts, placement, shared, *prices)
        assert find_cost(plan, *prices) >= best
        over.append(find_cost(plan, *prices) / max(best, 1) - 1)
    assert np.mean(over) < 0.03 and max(over) < 0.35


@pytest.mark.parametrize("seed", [0, 1])
def test_one_slot_a_rank_levels_a_hot_set_with_one_clone_less_than_ranks(seed: int) -> None:
    placement, shared = add_shared_slots(make_home_placement(2, 64, 8, 0), 1)
    for counts in make_workload("rotating_micro", 10, seed=seed):
        plan = plan_exact(counts, placement, shared)
        assert measure_balancedness(sum_by_rank(plan.tokens, placement.cluster)).min() > 0.995
        assert plan.near.max() <= 7


def test_clones_come_from_their_own_node_where_that_does() -> None:
    # Two nodes of two ranks, each with one hot rank: nothing has to cross.
    placement, shared = add_shared_slots(make_home_placement(1, 8, 4, 0, 2), 1)
    plan = plan_exact(np.array([[300, 300, 100, 100, 300, 300, 100, 100]]), placement, shared)
    assert (plan.near.sum(), plan.far.sum()) == (2, 0)
    # One node has all tokens: half of them have to cross.
    counts = np.array([[200, 200, 200, 200, 0, 0, 0, 0]])
    plan = plan_exact(counts, placement, shared)
    assert plan.far.sum() == 2 and sum_by_rank(plan.tokens, placement.cluster).tolist() == [[200, 200, 200, 200]]
    # Too dear: a crossing has to save its price.
    assert plan_exact(counts, placement, shared, (1, 201 * UNIT)).far.sum() == 0


def test_balanced_loads_use_no_clone() -> None:
    placement, shared = add_shared_slots(make_home_placement(1, 8, 4, 0), 1)
    for prices in (FREE, Costs().price_clones(4)):
        plan = plan_exact(np.full((1, 8), 1000), placement, shared, prices)
        assert plan.near.sum() == 0 and (plan.placement.experts[:, shared] == EMPTY).all()


def test_prices_by_hand() -> None:
    costs = Costs(expert_bytes=1e6, token_time=1e-6, node_speed=1e9, network_speed=1e8, clone_time=2e-3, exposed=0.5)
    # Four times the weights take 4 ms or 40 ms, half of it hidden; with 2 ms of its own a clone costs 4 or 22 ms, on 2 ranks.
    assert costs.price_clones(2) == (2000 * UNIT, 11000 * UNIT)
    near, far = Costs().price_clones(8)
    assert near / UNIT == pytest.approx((100 + 0.15 * 880) / 0.66 / 8, rel=1e-3)
    assert far / UNIT == pytest.approx((100 + 0.15 * 88e6 * 4 / 45e9 * 1e6) / 0.66 / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"node_speed": 0.0}, "node speed in bytes a second 0.0 given; allowed: a finite number from 1"),
        ({"network_speed": 0.0}, "network speed in bytes a second 0.0 given"),
        ({"network_speed": float("nan")}, "network speed in bytes a second nan given"),
        ({"exposed": 1.5}, "exposed share 1.5 given; allowed: a finite number from 0 to 1"),
        ({"expert_bytes": -1.0}, "expert bytes -1.0 given"),
        ({"token_time": 0.0}, "token time in seconds 0.0 given"),
    ],
)
def test_costs_that_cannot_be_are_refused(wrong: dict[str, float], said: str) -> None:
    with refuses(said, BalanceError):
        Costs(**wrong)


def test_what_no_dispatcher_serves_is_refused() -> None:
    homes = make_home_placement(1, 8, 4, 1)
    placement, shared = add_shared_slots(homes, 1)
    counts = np.ones((1, 8), np.int64)
    taken = placement.experts.copy()
    taken[0, np.flatnonzero(shared)[2]] = 5
    with refuses("layer 0: shared slot 11 holds a clone of expert 5; allowed: empty slots", BalanceError):
        plan_exact(counts, Placement(placement.cluster, taken, placement.homes), shared)
    with refuses("layer 0: shared slot 0 holds the home of expert 0; allowed: empty slots", BalanceError):
        plan_exact(counts, placement, np.ones_like(shared))
    with refuses("shared slots of type int64 and shape (16,); allowed: bool, [16 slots]", BalanceError):
        plan_exact(counts, placement, shared.astype(np.int64))
    with refuses("counts of 9.0072e+15 tokens in a layer; allowed: 1.1259e+15 at most", BalanceError):
        plan_exact(counts * 2**50, placement, shared)
    with refuses("counts of 9 experts for a placement that holds experts up to 7", BalanceError):
        plan_exact(np.ones((1, 9), np.int64), placement, shared)
    with refuses("a placement without homes", BalanceError):
        plan_exact(counts, Placement(placement.cluster, placement.experts), shared)
    with refuses("price of a clone -1 given; allowed: a whole number from 0", BalanceError):
        plan_exact(counts, placement, shared, (-1, 1))
