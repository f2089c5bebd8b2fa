"""Free placement: every constraint kept, bounds that hold, and little above the best there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.balance.kernels.packing import count_copies
from counterflow.balance.placement import Placement, share_evenly, sum_by_rank
from counterflow.balance.planning import SPILL_TO, Plan, plan_placement
from counterflow.balance.reference import count_copies_slowly, place_best, solve_traffic
from counterflow.errors import BalanceError


def check_plan(loads: Array, plan: Plan) -> None:
    """Every expert has a slot, no rank two copies of one, all slots are used, and the figures are those of the placement."""
    cluster = plan.placement.cluster
    for held in plan.placement.experts:
        assert set(held.tolist()) == set(range(loads.shape[1]))
        for first, last in zip(cluster.rank_start[:-1], cluster.rank_start[1:], strict=True):
            assert len(set(held[first:last].tolist())) == last - first
    sums = sum_by_rank(share_evenly(loads, plan.placement), cluster)
    np.testing.assert_allclose(plan.rank_loads, sums, rtol=1e-12)
    assert (plan.rank_loads.max(1) >= plan.bound * (1 - 1e-9)).all()


@st.composite
def draw_cases(draw: st.DrawFn) -> tuple[Array, Cluster]:
    """Return loads of two layers and a cluster whose ranks may have different numbers of slots."""
    ranks = draw(st.integers(1, 6))
    experts = draw(st.integers(2, 12))
    widths = draw(st.lists(st.integers(1, experts), min_size=ranks, max_size=ranks))
    while sum(widths) < experts:
        widths.append(min(experts, experts - sum(widths)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    loads = random.lognormal(0, draw(st.sampled_from([0.1, 1.0, 2.0])), (2, experts)) * (random.random((2, experts)) < 0.8)
    loads[:, 0] += 1
    return loads, Cluster(tuple(widths), (0,) * len(widths))


@given(draw_cases())
@settings(max_examples=200, deadline=None)
def test_a_global_plan_keeps_its_constraints_on_ranks_of_any_width(case: tuple[Array, Cluster]) -> None:
    loads, cluster = case
    check_plan(loads, plan_placement(loads, cluster, policy="global"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", ["auto", "hierarchical", "global", "spill"])
@pytest.mark.parametrize("load", [0.0, 5e-324])  # half of the latter is 0
def test_without_any_load_all_experts_count_alike(policy: str, load: float) -> None:
    loads, cluster = np.array([[load] * 8, range(1, 9)]), make_cluster(4, 12, 2)
    plan = plan_placement(loads, cluster, 2, policy)
    check_plan(np.where(loads < 1, 0, loads), plan)
    assert plan.balancedness[0] == plan.best_balancedness[0] == 1 and plan.off_node[0] == 0
    alike = plan_placement(np.array([[1.0] * 8, range(1, 9)]), cluster, 2, policy)
    np.testing.assert_array_equal(plan.placement.experts, alike.placement.experts)
    alone = plan_placement(loads[:1], cluster, 2, policy)
    np.testing.assert_array_equal(alone.placement.experts, plan.placement.experts[:1])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_under_hierarchical_no_copy_leaves_its_node_and_spilling_is_stated(
    nodes: int, ranks: int, per_node: int, size: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    groups = nodes * per_node
    experts = groups * size
    slots = min(per_node * size, -(-per_node * size // ranks) + int(random.integers(0, 2)))
    cluster = make_cluster(nodes * ranks, nodes * ranks * slots, nodes)
    loads = random.lognormal(0, 1, (2, experts))
    plan = plan_placement(loads, cluster, groups, "hierarchical")
    check_plan(loads, plan)
    assert not plan.off_node.any()
    for layer in range(2):
        nodes_of_group = [set(cluster.node_of_slot[plan.placement.experts[layer] // size == group]) for group in range(groups)]
        assert all(len(some) == 1 for some in nodes_of_group), "a group on two nodes"
    spilled = plan_placement(loads, cluster, groups, "spill")
    check_plan(loads, spilled)
    assert (spilled.rank_loads.max(1) <= plan.rank_loads.max(1) * (1 + 1e-9)).all(), (
        "spilling must not make the slowest rank slower"
    )
    np.testing.assert_array_equal(
        spilled.off_node > 0, (spilled.rank_loads.max(1) < plan.rank_loads.max(1)) & (spilled.off_node > 0)
    )


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.integers(0, 30), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_copies_are_dealt_out_as_the_obvious_loop_does(weights: list[float], extra: int, most: int) -> None:
    given_ = np.array(weights)
    fast = count_copies(given_, len(weights) + extra, most)
    slow = count_copies_slowly(given_, len(weights) + extra, most)
    assert fast.sum() == slow.sum()
    np.testing.assert_allclose((given_ / fast).max(), (given_ / slow).max())


@pytest.mark.parametrize("seed", range(3))
def test_small_plans_are_near_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    gaps = []
    for _ in range(20):
        loads = random.lognormal(0, 1, (1, 5))
        cluster = Cluster((2, 2, 3), (0, 0, 0))
        plan = plan_placement(loads, cluster, policy="global")
        best = place_best(loads[0], cluster)
        gaps.append(float(plan.rank_loads.max()) / best)
    assert min(gaps) >= 1 - 1e-9, "better than the best of all: the reference or the plan is wrong"
    assert np.mean(gaps) < 1.06 and max(gaps) < 1.25


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_at_the_size_of_deepseek_v3(sigma: float) -> None:
    loads = np.random.default_rng(11).lognormal(0, sigma, (8, 256))
    cluster = make_cluster(64, 320, 8)
    plan = plan_placement(loads, cluster, 8, "global")
    check_plan(loads, plan)
    assert plan.balancedness.mean() >= 0.985
    spilled = plan_placement(loads, cluster, 8, "spill")
    check_plan(loads, spilled)
    assert spilled.balancedness.mean() >= 0.95
    home = np.arange(256) // 32
    least = sum(
        solve_traffic(weights, home, np.full(8, 8), slowest)
        for weights, slowest in zip(loads, spilled.rank_loads.max(1), strict=True)
    )
    assert spilled.off_node.sum() <= 1.2 * least


@pytest.mark.parametrize(("ranks", "experts", "nodes"), [(8, 64, 4), (16, 256, 4), (32, 512, 4)])
def test_spilling_helps_where_nodes_have_few_ranks(ranks: int, experts: int, nodes: int) -> None:
    loads = np.random.default_rng(5).lognormal(0, 1.5, (16, experts))
    cluster = make_cluster(ranks, experts * 3 // 2, nodes)
    plan = plan_placement(loads, cluster, nodes, "spill")
    check_plan(loads, plan)
    assert plan.balancedness.mean() >= 0.94 and plan.balancedness.min() >= 0.9


def test_spilling_stops_where_traffic_costs_more_than_it_saves() -> None:
    loads = np.random.default_rng(3).lognormal(0, 1, (4, 64))
    cluster = make_cluster(16, 80, 4)
    free = plan_placement(loads, cluster, 4, "spill", traffic_weight=0.0)
    dear = plan_placement(loads, cluster, 4, "spill", traffic_weight=100.0)
    assert free.off_node.all() and not dear.off_node.any()
    assert (free.balancedness > SPILL_TO - 0.05).all()
    within = plan_placement(loads, cluster, 4, "hierarchical")
    assert (dear.placement.experts == within.placement.experts).all()


def test_nodes_may_interleave_ranks() -> None:
    loads = np.random.default_rng(4).lognormal(0, 1, (3, 16))
    cluster = Cluster((5, 5, 5, 5), (0, 1, 0, 1))
    plan = plan_placement(loads, cluster, 2, "hierarchical")
    check_plan(loads, plan)
    for held in plan.placement.experts:
        assert len({(expert // 8, node) for expert, node in zip(held.tolist(), cluster.node_of_slot.tolist(), strict=True)}) == 2


@pytest.mark.parametrize("policy", ["global", "hierarchical", "spill"])
def test_a_node_may_have_no_load_to_speak_of(policy: str) -> None:
    loads = np.array([[1.0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 2, 1, 0, 0], [1.0, 0, 0, 0, 5e-324, 0, 0, 0]])
    check_plan(loads, plan_placement(loads, make_cluster(4, 12, 2), 2, policy))


@pytest.mark.parametrize(
    ("loads", "cluster", "groups", "policy", "said"),
    [
        (np.ones((1, 8)), make_cluster(2, 6), 1, "global", "6 slots for 8 experts"),
        (np.ones((1, 8)), make_cluster(2, 8), 3, "auto", "3 groups of 8 experts"),
        (np.ones((1, 8)), make_cluster(2, 8, 2), 1, "spill", "1 groups on 2 nodes"),
        (np.ones((1, 8)), make_cluster(2, 8), 1, "best", "policy 'best'"),
        (np.ones((1, 2)), make_cluster(2, 6), 1, "global", "3 slots for 2 experts"),
        (np.ones((1, 8)), Cluster((3, 5), (0, 0)), 1, "deepseek", "equal ranks"),
        (np.ones((1, 8)), Cluster((4, 4, 4), (0, 0, 1)), 2, "hierarchical", None),
        (np.ones((1, 8)), Cluster((4, 4, 3), (0, 0, 1)), 2, "hierarchical", "a node with 3 slots"),
        (-np.ones((1, 8)), make_cluster(2, 8), 1, "global", "-1"),
        (np.full((1, 8), np.nan), make_cluster(2, 8), 1, "global", "nan"),
    ],
)
def test_what_cannot_work_is_refused(loads: Array, cluster: Cluster, groups: int, policy: str, said: str | None) -> None:
    if said is None:
        check_plan(loads, plan_placement(loads, cluster, groups, policy))
        return
    with pytest.raises(BalanceError, match=said):
        plan_placement(loads, cluster, groups, policy)


@pytest.mark.parametrize(
    ("experts", "homes", "said"),
    [
        ([[0, 1, 2, 0, 1]], None, "shape \\(1, 5\\)"),
        ([0, 1, 2, 0], None, "shape \\(4,\\)"),
        ([[0.0, 1, 2, 0]], None, "type float64"),
        ([[0, 1, -2, 0]], None, "integers from -1"),
        ([[0, 1, 2, -1]], [[0, 1], [0, 1]], "homes of type int64 and shape \\(2, 2\\)"),
        ([[0, 1, 2, -1]], [[0.0, 1, 2]], "homes of type float64"),
        ([[0, 1, 2, -1]], [[0, 1, 4]], "homes from slot 0 to 4; allowed: 0 to 3"),
        ([[0, 1, 2, -1]], [[0, 2, 1]], "slot 2, the home of expert 1, holds 2"),
        ([[0, 1, 2, -1]], [[0, 1]], "expert 2 in a slot beside homes of 2 experts"),
    ],
)
def test_a_placement_that_points_nowhere_is_refused(experts: object, homes: object, said: str) -> None:
    with pytest.raises(BalanceError, match=said):
        Placement(make_cluster(2, 4), np.array(experts), None if homes is None else np.array(homes))


def test_slots_must_divide() -> None:
    with pytest.raises(BalanceError, match="9 slots on 2 ranks"):
        make_cluster(2, 9)
    with pytest.raises(BalanceError, match="4 ranks on 3 nodes"):
        make_cluster(4, 8, 3)


def test_even_shares_of_a_known_placement() -> None:
    placement = Placement(make_cluster(2, 4), np.array([[0, 1, 0, 2]]))
    assert share_evenly(np.array([[8.0, 3.0, 5.0]]), placement).tolist() == [[4.0, 3.0, 4.0, 5.0]]
