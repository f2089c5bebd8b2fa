"""The token split: whole, the best there is, and the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, sum_by_rank
from counterflow.balance.reference import bound_split, solve_split
from counterflow.balance.split import split_tokens
from counterflow.errors import BalanceError
from tests.support.running import run_python


@st.composite
def draw_layers(draw: st.DrawFn) -> tuple[Array, Placement]:
    """Return counts and a placement on ranks of unequal width, with empty slots and several copies on a rank."""
    ranks = draw(st.integers(1, 6))
    widths = draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
    layers, slots = draw(st.integers(1, 3)), sum(widths)
    experts = draw(st.integers(1, slots))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rest = random.integers(EMPTY, experts, (layers, slots - experts))
    held = np.stack([random.permutation(np.concatenate([np.arange(experts), more])) for more in rest])
    scale = draw(st.sampled_from([1, 3, 100, 10**6]))
    counts = random.integers(0, scale + 1, (layers, experts)) * (
        random.random((layers, experts)) < draw(st.sampled_from([0.3, 1.0]))
    )
    return counts, Placement(Cluster(tuple(widths), (0,) * ranks), held)


@given(draw_layers())
@settings(max_examples=300, deadline=None)
def test_a_split_is_whole_and_no_split_has_a_faster_slowest_rank(case: tuple[Array, Placement]) -> None:
    counts, placement = case
    tokens = split_tokens(counts, placement)
    assert tokens.dtype == np.int64 and tokens.min(initial=0) >= 0
    assert not tokens[placement.experts == EMPTY].any()
    for layer in range(placement.layers):
        held = placement.experts[layer]
        sums = np.bincount(held[held != EMPTY], tokens[layer][held != EMPTY], counts.shape[1])
        assert (sums == counts[layer]).all(), "tokens lost or made up"
        best = bound_split(counts[layer], held, placement.cluster.rank_of_slot)
        assert sum_by_rank(tokens[layer], placement.cluster).max() == best


@pytest.mark.parametrize("seed", range(4))
def test_at_full_size_the_split_equals_a_linear_program(seed: int) -> None:
    random = np.random.default_rng(seed)
    placement = make_home_placement(2, 256, 64, 1)
    placement.experts[placement.experts == EMPTY] = random.integers(0, 256, 128)
    counts = np.rint(random.lognormal(0, 1, (2, 256)) * 1000).astype(np.int64)
    slowest = sum_by_rank(split_tokens(counts, placement), placement.cluster).max(1)
    for layer in range(2):
        best = solve_split(counts[layer], placement.experts[layer], placement.cluster.rank_of_slot)
        # Whole tokens cost less than one token.
        assert best - 1e-6 <= slowest[layer] < best + 1


def test_tokens_stay_at_home_where_nobody_waits_for_it() -> None:
    placement = make_home_placement(1, 4, 2, 1)
    placement.experts[0, [2, 5]] = [2, 0]
    tokens = split_tokens(np.array([[50, 50, 50, 50]]), placement)
    assert tokens.tolist() == [[50, 50, 0, 50, 50, 0]]


def test_layers_are_split_as_if_alone() -> None:
    random = np.random.default_rng(5)
    placement = make_home_placement(6, 16, 4, 2)
    placement.experts[placement.experts == EMPTY] = random.integers(0, 16, 48)
    counts = random.integers(0, 1000, (6, 16))
    together = split_tokens(counts, placement)
    for layer in range(6):
        assert placement.homes is not None
        alone = Placement(placement.cluster, placement.experts[layer : layer + 1], placement.homes[layer : layer + 1])
        assert (split_tokens(counts[layer : layer + 1], alone)[0] == together[layer]).all()


FOUND = {
    "split": "split_tokens(random.integers(0, 999, (4, 64)), spread)",
    "shares": "share_tokens(random.integers(0, 999, (16, 64)), Placement(spread.cluster, spread.experts[:1], spread.homes[:1]), "
    "np.arange(16) // 2)",
    "homes": "plan_homes(random.lognormal(0, 1, (4, 2, 64)), make_home_placement(2, 64, 8, 1), 1000).placement.homes",
}


@pytest.mark.slow
def test_every_process_finds_the_same() -> None:
    code = (
        "import numpy as np, hashlib; from counterflow.balance import *; "
        "random = np.random.default_rng(7); spread = make_home_placement(4, 64, 8, 2, 2); "
        "spread.experts[spread.experts < 0] = random.integers(0, 64, 64); "
        f"found = {{{', '.join(f'{name!r}: {call}' for name, call in FOUND.items())}}}; "
        "print({name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in found.items()})"
    )
    first, second = (run_python("-c", code) for _ in range(2))
    assert first == second and all(name in first for name in FOUND)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (np.ones((2, 4)), "whole numbers"),
        (np.full((2, 4), -1), "0 or more"),
        (np.ones((1, 4), np.int64), "2 layers"),
        (np.ones((2, 3), np.int64), "3 experts"),
        (np.ones((2, 5), np.int64), "5 experts"),
        (np.full((2, 4), 2**63 - 1), "3.68935e\\+19 tokens in a layer"),
        (np.full((2, 4), 2**63, np.uint64), "3.68935e\\+19 tokens in a layer"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: Array, said: str) -> None:
    with pytest.raises(BalanceError, match=said):
        split_tokens(counts, make_home_placement(2, 4, 2, 1))


@given(draw_layers(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_copy_that_is_added_is_linked_as_if_it_had_been_there(case: tuple[Array, Placement], seed: int) -> None:
    from counterflow.balance.kernels.flow import insert_copy, link_slots

    counts, placement = case
    held, cluster = placement.experts[0].copy(), placement.cluster
    own = np.array([np.flatnonzero(held == expert)[0] for expert in range(counts.shape[1])])
    copies = np.setdiff1d(np.flatnonzero(held != EMPTY), own)
    added = np.random.default_rng(seed).permutation(copies)
    experts = np.where(np.isin(np.arange(len(held)), own), held, EMPTY)
    links = link_slots(experts, cluster.rank_of_slot, cluster.rank_start, own)
    for slot in added:
        experts[slot] = held[slot]
        insert_copy(links, slot)
    anew = link_slots(held, cluster.rank_of_slot, cluster.rank_start, own)
    used = anew.expert_start[-1]
    assert (links.expert_start == anew.expert_start).all()
    assert (links.copies[:used] == anew.copies[:used]).all()
