"""What each source sends to each slot: whole, by the split, and near where it can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement, make_home_placement
from counterflow.balance.reference import solve_staying
from counterflow.balance.shares import share_tokens
from counterflow.balance.split import split_tokens
from counterflow.errors import BalanceError

Case = tuple[Array, Placement, Array]


@st.composite
def draw_cases(draw: st.DrawFn) -> Case:
    """Return counts, a placement on ranks of unequal width, on up to three nodes in any order, and the ranks of the sources."""
    ranks = draw(st.integers(1, 5))
    widths = draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
    nodes = draw(st.integers(1, min(3, ranks)))
    slots, sources = sum(widths), draw(st.integers(0, 6))
    experts = draw(st.integers(1, min(slots, 8)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    node_of_rank = random.permutation(np.arange(ranks) % nodes)
    held = random.permutation(np.concatenate([np.arange(experts), random.integers(EMPTY, experts, slots - experts)]))
    homes = np.array([random.choice(np.flatnonzero(held == expert)) for expert in range(experts)])
    counts = random.integers(0, draw(st.sampled_from([2, 100, 10**6])), (sources, experts))
    counts *= random.random((sources, experts)) < draw(st.sampled_from([0.3, 1.0]))
    placement = Placement(Cluster(tuple(widths), tuple(node_of_rank.tolist())), held[None], homes[None])
    return counts, placement, random.integers(0, ranks, sources)


def count_staying(shares: Array, of_source: Array, of_slot: Array) -> int:
    return int(shares[of_source[:, None] == of_slot].sum())


@given(draw_cases())
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_shares_make_up_the_split_and_all_that_sources_have(case: Case) -> None:
    counts, placement, rank_of_source = case
    shares = share_tokens(counts, placement, rank_of_source)
    held = placement.experts[0]
    assert shares.dtype == np.int64 and shares.min(initial=0) >= 0
    assert (shares.sum(0) == split_tokens(counts.sum(0)[None], placement)[0]).all(), "not the split"
    for expert in range(counts.shape[1]):
        assert (shares[:, held == expert].sum(1) == counts[:, expert]).all(), f"tokens of expert {expert} lost or made up"


@given(draw_cases())
@settings(max_examples=60, deadline=None)
def test_no_sharing_of_the_split_keeps_more_tokens_on_ranks_or_on_nodes(case: Case) -> None:
    counts, placement, rank_of_source = case
    if not len(counts):
        return
    cluster, held = placement.cluster, placement.experts[0]
    shares = share_tokens(counts, placement, rank_of_source)
    node_of_source = np.array(cluster.node_of_rank)[rank_of_source]
    for of_source, of_slot in ((rank_of_source, cluster.rank_of_slot), (node_of_source, cluster.node_of_slot)):
        assert count_staying(shares, of_source, of_slot) == solve_staying(counts, shares.sum(0), held, of_source, of_slot)


def test_tokens_go_to_the_own_rank_then_to_the_node_then_anywhere() -> None:
    # Expert 0 has its home on rank 0 and clones on ranks 1 and 2; ranks 0 and 1 are one node, 2 and 3 the other.
    cluster = Cluster((2, 2, 2, 2), (0, 0, 1, 1))
    placement = Placement(cluster, np.array([[0, EMPTY, 1, 0, 2, 0, 3, EMPTY]]), np.array([[0, 2, 4, 6]]))
    counts = np.array([[30, 0, 0, 0], [120, 0, 0, 0], [20, 0, 0, 0], [130, 0, 0, 7]])
    shares = share_tokens(counts, placement, np.arange(4))
    assert shares[:, [0, 3, 5]].tolist() == [[30, 0, 0], [20, 100, 0], [0, 0, 20], [50, 0, 80]]
    assert shares.sum() == counts.sum() and shares[3, 6] == 7


def test_several_sources_of_a_rank_fill_its_slots_together() -> None:
    placement = make_home_placement(1, 2, 2, 1)
    placement.experts[0, 3] = 0
    counts = np.array([[10, 0], [20, 0], [30, 0], [40, 0]])
    shares = share_tokens(counts, placement, np.array([1, 0, 1, 0]))
    assert shares.tolist() == [[0, 0, 0, 10], [20, 0, 0, 0], [0, 0, 0, 30], [30, 0, 0, 10]]


def test_without_clones_every_token_goes_home() -> None:
    random = np.random.default_rng(1)
    placement = make_home_placement(1, 16, 4, 0)
    counts = random.integers(0, 100, (8, 16))
    assert (share_tokens(counts, placement, np.arange(8) // 2) == counts[:, placement.experts[0]]).all()


@pytest.mark.parametrize(
    ("counts", "ranks", "said"),
    [
        (np.ones((2, 4)), [0, 1], "counts of type float64"),
        (np.ones((2, 3), np.int64), [0, 1], "4 experts of the placement"),
        (np.ones(4, np.int64), [0, 1], "counts of type int64 and shape"),
        (np.full((2, 4), -1), [0, 1], "counts from -1 to 0 "),
        (np.full((2, 4), 2**60), [0, 1], "counts from 0 to 5.76461e\\+17"),
        (np.full((2, 4), 2**63, np.uint64), [0, 1], "counts from"),
        (np.ones((2, 4), np.int64), [0], "one for each of the 2 sources"),
        (np.ones((2, 4), np.int64), [0.0, 1.0], "ranks of sources of type float64"),
        (np.ones((2, 4), np.int64), [0, 2], "ranks from 0 to 1"),
        (np.ones((2, 4), np.int64), [-1, 0], "ranks from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(counts: Array, ranks: list[float], said: str) -> None:
    with pytest.raises(BalanceError, match=said) as raised:
        share_tokens(counts, make_home_placement(1, 4, 2, 1), np.array(ranks))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("layers", "homes"), [(2, True), (1, False)])
def test_placements_of_several_layers_or_without_homes_are_refused(layers: int, homes: bool) -> None:
    placement = make_home_placement(layers, 4, 2, 1)
    if not homes:
        placement = Placement(placement.cluster, placement.experts)
    with pytest.raises(BalanceError, match="allowed: one layer, with homes"):
        share_tokens(np.ones((2, 4), np.int64), placement, np.arange(2))
