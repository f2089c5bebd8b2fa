"""Moves between placements: as few as can be, senders as level as can be, rounds as few as can be."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.balance.moves import Moves, find_copies, keep_slots, plan_moves
from counterflow.balance.placement import EMPTY, Placement, make_home_placement
from counterflow.errors import BalanceError


@st.composite
def draw_pair(draw: st.DrawFn, experts: int, most_slots: int, layers: int) -> tuple[Placement, Placement]:
    """Two placements of unequal ranks and any contents, empty slots and doubled experts too; the first holds each expert."""
    widths = draw(st.lists(st.integers(1, most_slots), min_size=2, max_size=5).filter(lambda found: sum(found) >= experts))
    nodes = draw(st.lists(st.integers(0, 1), min_size=len(widths), max_size=len(widths)))
    cluster = Cluster(tuple(widths), tuple(nodes) if 0 in nodes else (0,) * len(widths))
    held = st.lists(st.integers(EMPTY, experts - 1), min_size=cluster.slots, max_size=cluster.slots)
    old = np.array([draw(held) for _ in range(layers)])
    for row in old:
        row[draw(st.permutations(range(cluster.slots)))[:experts]] = np.arange(experts)
    new = np.array([draw(held) for _ in range(layers)])
    return Placement(cluster, old), Placement(cluster, new)


def list_by_rank(placement: Placement, layer: int) -> list[list[int]]:
    """The experts of each rank of a layer."""
    ends = placement.cluster.rank_start
    return [placement.experts[layer, ends[rank] : ends[rank + 1]].tolist() for rank in range(placement.cluster.ranks)]


def list_needed(old: Placement, new: Placement) -> list[tuple[int, int, int]]:
    """Reference: (layer, rank, expert) of what a rank gets that it does not hold."""
    return [
        (layer, rank, expert)
        for layer in range(old.layers)
        for rank, (held, wanted) in enumerate(zip(list_by_rank(old, layer), list_by_rank(new, layer), strict=True))
        for expert in sorted(set(wanted) - set(held) - {EMPTY})
    ]


def list_senders(old: Placement, layer: int, rank: int, expert: int) -> list[int]:
    """Reference: the ranks that may send, those of the rank's node alone where that has any."""
    nodes = old.cluster.node_of_rank
    holding = [other for other, held in enumerate(list_by_rank(old, layer)) if expert in held]
    return [other for other in holding if nodes[other] == nodes[rank]] or holding


def find_least_send(old: Placement, new: Placement) -> int:
    """Reference: of all choices of senders, the least that the rank which sends most can send."""
    choices = [list_senders(old, *needed) for needed in list_needed(old, new)]
    return min(max((chosen.count(rank) for rank in set(chosen)), default=0) for chosen in itertools.product(*choices))


def apply(old: Placement, new: Placement, moves: Moves) -> Array:
    """What the slots hold after the moves and the copies, by the words of their docstrings."""
    after = np.where(new.experts == EMPTY, EMPTY, old.experts)
    for layer in range(moves.layers):
        for index in range(moves.layer_start[layer], moves.layer_start[layer + 1]):
            assert moves.layer[index] == layer
            assert old.experts[layer, moves.source[index]] == moves.expert[index]
            after[layer, moves.slot[index]] = old.experts[layer, moves.source[index]]
    copies = find_copies(old, new)
    ranks = new.cluster.rank_of_slot
    for layer, slot, source, arrives in zip(*copies, strict=True):
        assert ranks[slot] == ranks[source] and slot != source
        after[layer, slot] = (after if arrives else old.experts)[layer, source]
    return after


@settings(max_examples=150, deadline=None)
@given(pair=draw_pair(experts=5, most_slots=4, layers=3))
def test_moves_are_the_fewest_and_lead_to_the_new_placement(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    moves = plan_moves(old, new)
    ranks = new.cluster.rank_of_slot
    done = sorted(zip(moves.layer.tolist(), ranks[moves.slot].tolist(), moves.expert.tolist(), strict=True))
    assert done == list_needed(old, new)
    for layer, rank, expert, source in zip(moves.layer, ranks[moves.slot], moves.expert, ranks[moves.source], strict=True):
        assert source in list_senders(old, layer, rank, expert)
    assert (np.diff(moves.layer * new.cluster.slots + moves.slot) > 0).all()
    np.testing.assert_array_equal(apply(old, new, moves), new.experts)
    assert moves.sends.tolist() == [int((ranks[moves.source] == rank).sum()) for rank in range(new.cluster.ranks)]
    assert moves.receives.tolist() == [int((ranks[moves.slot] == rank).sum()) for rank in range(new.cluster.ranks)]


@settings(max_examples=150, deadline=None)
@given(pair=draw_pair(experts=3, most_slots=3, layers=2).filter(lambda pair: len(list_needed(*pair)) <= 9))
def test_the_rank_that_sends_most_sends_the_least_it_can(pair: tuple[Placement, Placement]) -> None:
    assert plan_moves(*pair).sends.max() == find_least_send(*pair)


@settings(max_examples=150, deadline=None)
@given(pair=draw_pair(experts=6, most_slots=5, layers=3), most=st.integers(1, 4))
def test_rounds_are_bounded_and_as_few_as_can_be(pair: tuple[Placement, Placement], most: int) -> None:
    moves = plan_moves(*pair, most_per_round=most)
    ranks = moves.cluster.rank_of_slot
    for number in range(moves.rounds):
        for ends in (moves.source, moves.slot):
            assert 1 <= np.bincount(ranks[ends[moves.round == number]]).max() <= most
    assert moves.rounds == -(-max(moves.sends.max(), moves.receives.max()) // most)
    np.testing.assert_array_equal(moves.source, plan_moves(*pair).source)


@settings(max_examples=150, deadline=None)
@given(pair=draw_pair(experts=5, most_slots=5, layers=2))
def test_what_a_rank_holds_already_stays_in_its_slot(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    kept = keep_slots(old, new)
    for layer in range(new.layers):
        groups = (list_by_rank(placement, layer) for placement in (old, new, kept))
        for held, wanted, got in zip(*groups, strict=True):
            assert sorted(got) == sorted(wanted)
            common = sum(min(held.count(expert), wanted.count(expert)) for expert in set(wanted))
            assert sum(one == other for one, other in zip(held, got, strict=True)) == common
    np.testing.assert_array_equal(keep_slots(old, kept).experts, kept.experts)


def test_homes_stay_where_they_are() -> None:
    old = make_home_placement(1, 4, 2, 2)
    old.experts[0] = [0, 1, 2, 3, 2, 3, 0, 1]
    new = replace(old, experts=np.array([[0, 1, 3, 1, 2, 3, 2, 0]]))
    kept = keep_slots(old, new)
    assert kept.experts.tolist() == [[0, 1, 1, 3, 2, 3, 0, 2]] and kept.homes is old.homes
    assert new.experts.tolist() == [[0, 1, 3, 1, 2, 3, 2, 0]]


def test_a_home_that_changed_is_not_put_back() -> None:
    old = make_home_placement(1, 4, 2, 1)
    old.experts[0] = [0, 1, 2, 2, 3, 0]
    new = Placement(old.cluster, np.array([[1, 2, 0, 2, 3, 1]]), np.array([[2, 0, 1, 4]]))
    kept = keep_slots(old, new)
    assert kept.experts.tolist() == new.experts.tolist()
    assert keep_slots(old, replace(new, homes=None)).experts.tolist() == [[0, 1, 2, 2, 3, 1]]
    copies = find_copies(old, kept)
    assert [part.tolist() for part in copies] == [[0, 0, 0], [0, 1, 2], [1, 2, 0], [False] * 3]


def test_unchanged_placements_need_no_moves() -> None:
    old = make_home_placement(3, 8, 4, 1)
    moves = plan_moves(old, old, most_per_round=1)
    assert (moves.count, moves.rounds, moves.layer_start.tolist()) == (0, 0, [0, 0, 0, 0])
    assert moves.sends.tolist() == moves.receives.tolist() == [0] * 4
    assert len(find_copies(old, old).slot) == 0
    assert keep_slots(old, old).experts.tolist() == old.experts.tolist()


def test_a_near_copy_is_taken_before_a_far_one() -> None:
    cluster = make_cluster(4, 8, nodes=2)
    old = Placement(cluster, np.array([[0, EMPTY, 1, EMPTY, 0, EMPTY, 2, EMPTY]]))
    new = Placement(cluster, np.array([[0, EMPTY, 1, 0, 0, 1, 2, 0]]))
    moves = plan_moves(old, new)
    assert moves.slot.tolist() == [3, 5, 7] and moves.source.tolist() == [0, 2, 4]
    assert moves.off_node.tolist() == [False, True, False] and moves.expert.tolist() == [0, 1, 0]


def test_senders_are_levelled_over_all_layers() -> None:
    cluster = make_cluster(4, 8)
    old = Placement(cluster, np.tile([0, 1, 0, 1, 2, 3, 2, 3], (3, 1)))
    new = Placement(cluster, np.tile([2, 3, 2, 3, 0, 1, 0, 1], (3, 1)))
    moves = plan_moves(old, new, most_per_round=2)
    assert moves.count == 24 and moves.sends.tolist() == [6] * 4 and moves.rounds == 3


@pytest.mark.parametrize(
    ("new", "most", "said"),
    [
        ([[0, 1, 5, 3]], None, "layer 0: expert 5 of the new placement is nowhere in the old one"),
        ([[0, 1, 2, 3]], 0, "0 transfers per round; allowed: 1 or more"),
        ([[0, 1, 2, 3]] * 2, None, "placements of 1 and 2 layers; allowed: as many in both"),
        (
            [[0, 1, 2, 3, 4, 5]],
            None,
            "placements of 4 slots on 2 ranks and 1 nodes, and of 6 on 2 and 1; allowed: two of the same",
        ),
    ],
)
def test_bad_pairs_are_refused(new: list[list[int]], most: int | None, said: str) -> None:
    old = Placement(make_cluster(2, 4), np.array([[0, 1, 2, 3]]))
    with pytest.raises(BalanceError, match=said.replace("(", r"\(")) as raised:
        plan_moves(old, Placement(make_cluster(2, len(new[0])), np.array(new)), most)
    assert "\n" not in str(raised.value)
