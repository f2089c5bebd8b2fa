"""From one free placement to the next: few moves, and none that are not worth it."""

from itertools import permutations

import numpy as np
import pytest

from counterflow.balance.changes import count_common, match_ranks, take_if_worth
from counterflow.balance.cluster import make_cluster
from counterflow.balance.moves import plan_moves
from counterflow.balance.placement import Placement, make_home_placement, share_evenly, sum_by_rank
from counterflow.balance.planning import plan_placement
from counterflow.errors import BalanceError


@pytest.mark.parametrize("seed", range(5))
def test_renamed_ranks_need_the_fewest_moves_of_all_names(seed: int) -> None:
    random = np.random.default_rng(seed)
    cluster = make_cluster(4, 12)
    old, new = (Placement(cluster, np.stack([random.permutation(12) % 8])) for _ in range(2))
    renamed = [
        plan_moves(old, Placement(cluster, new.experts.reshape(4, 3)[list(order)].reshape(1, 12))).count
        for order in permutations(range(4))
    ]
    assert plan_moves(old, match_ranks(old, new)).count == min(renamed)


def test_renaming_keeps_loads_and_stays_on_nodes() -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (3, 64))
    cluster = make_cluster(8, 80, 2)
    old, new = (plan_placement(loads * factor, cluster, 2, "hierarchical") for factor in (1.0, 1.0 + np.arange(64) / 64))
    matched = match_ranks(old.placement, new.placement)
    for name in (0, 1):
        ranks = [rank for rank in range(8) if cluster.node_of_rank[rank] == name]
        rows = [
            np.sort(sum_by_rank(share_evenly(loads, placement), cluster)[:, ranks], 1) for placement in (matched, new.placement)
        ]
        np.testing.assert_allclose(*rows)
    assert plan_moves(old.placement, matched).count < plan_moves(old.placement, new.placement).count


def test_a_placement_is_taken_layer_by_layer_where_it_is_worth_its_moves() -> None:
    random = np.random.default_rng(2)
    loads = random.lognormal(0, 1, (4, 64))
    cluster = make_cluster(8, 72)
    old = plan_placement(loads, cluster, policy="global").placement
    later = loads.copy()
    later[2:] = random.lognormal(0, 1, (2, 64))
    new = plan_placement(later, cluster, policy="global").placement
    taken = take_if_worth(old, new, later, horizon=100)
    assert (taken.experts[:2] == old.experts[:2]).all(), "loads that did not change moved something"
    slowest = [sum_by_rank(share_evenly(later, placement), cluster).max(1) for placement in (old, taken)]
    assert (slowest[1][2:] < slowest[0][2:]).all()
    assert (take_if_worth(old, new, later, horizon=1, move_price=1e6).experts == old.experts).all()


def test_common_experts_are_counted_without_empty_slots() -> None:
    assert count_common(np.array([[0, 1], [2, -1]]), np.array([[1, -1], [0, 2]])).tolist() == [[1, 1], [0, 1]]


def test_what_cannot_change_is_refused() -> None:
    fixed, free = make_home_placement(1, 8, 4, 1), Placement(make_cluster(4, 8), np.arange(8)[None])
    with pytest.raises(BalanceError, match="fixed homes"):
        match_ranks(fixed, fixed)
    with pytest.raises(BalanceError, match="allowed: two of the same cluster"):
        match_ranks(free, Placement(make_cluster(2, 8), np.arange(8)[None]))
    with pytest.raises(BalanceError, match="horizon 0"):
        take_if_worth(free, free, np.ones((1, 8)), horizon=0)
