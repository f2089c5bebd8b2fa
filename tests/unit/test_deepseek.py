"""DeepSeek's placement: against recordings of its own code, a slow reference, and torch's order of equal keys."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.kernels.deepseek import place_as_deepseek
from counterflow.balance.kernels.introsort import sort_descending
from counterflow.errors import BalanceError

MAPS = ("phy2log", "log2phy", "logcnt")
# Recorded from deepseek-ai/EPLB under torch 2.14: few distinct loads, equal ones, zeros, loads that rise and fall, groups whose
# sums differ by torch's rounding alone (`_sums`: what torch said), and tenths, whose sums per GPU differ by float32's rounding
# alone.
TIES = Path(__file__).resolve().parents[1] / "data" / "eplb-ties.npz"
# Whole numbers of few values make ties, fractions make sums that have to be rounded.
LOADS = st.one_of(st.integers(0, 3), st.integers(0, 20).map(lambda tenths: tenths / 10), st.floats(0, 1000, width=32)).map(
    np.float32
)

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or sys.platform != "linux", reason="only torch's Linux builds sort with libstdc++"
)


def check_recording(path: Path) -> list[str]:
    """Compare every case of a recording, element by element; return the cases' names."""
    with np.load(path) as recorded:
        cases = [name.removesuffix("_args") for name in recorded.files if name.endswith("_args")]
        for case in cases:
            sums = recorded[f"{case}_sums"] if f"{case}_sums" in recorded.files else None
            maps = place_as_deepseek(recorded[f"{case}_weight"], *recorded[f"{case}_args"].tolist(), sums)
            for name, found in zip(MAPS, maps, strict=True):
                assert found.dtype == np.int64
                np.testing.assert_array_equal(found, recorded[f"{case}_{name}"], f"{case}: {name}")
    return cases


def test_the_recorded_cases_are_equal(shared_data: Path) -> None:
    assert len(check_recording(shared_data / "eplb_reference.npz")) == 12


def test_the_recorded_ties_are_equal() -> None:
    assert check_recording(TIES) == ["ties", "equal", "zeros", "hill", "sums", "tenths"]


def test_torchs_sums_decide_between_groups_that_weigh_the_same() -> None:
    with np.load(TIES) as recorded:
        weight, args = recorded["sums_weight"], recorded["sums_args"].tolist()
        alone = place_as_deepseek(weight, *args)[0]
        assert not np.array_equal(alone, recorded["sums_phy2log"])
    # Each group holds the same loads in another order: summed exactly, they are equal.
    np.testing.assert_array_equal(alone, place_as_deepseek(weight, *args, np.ones((2, 8), np.float32))[0])


def sort_with_torch(keys: Sequence[np.float32]) -> list[int]:
    import torch

    order: list[int] = torch.tensor(np.array(keys, np.float32)).sort(descending=True).indices.tolist()
    return order


def pack_slowly(loads: Sequence[np.float32], packs: int, sort: Callable[[Sequence[np.float32]], list[int]]) -> list[list[int]]:
    """The obvious reference: each item in turn looks at all packs."""
    room = len(loads) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    weights = [np.float32(0)] * packs
    for item in sort(loads):
        lightest = min((pack for pack in range(packs) if len(packed[pack]) < room), key=lambda pack: weights[pack])
        packed[lightest].append(item)
        weights[lightest] = np.float32(weights[lightest] + loads[item])
    return packed


def place_slowly(
    loads: Sequence[np.float32], sums: Sequence[np.float32], slots: int, nodes: int, gpus: int
) -> list[tuple[int, int]]:
    """The obvious reference: one layer's slots as (expert, which of its copies)."""
    size = len(loads) // len(sums)
    held = []
    for groups in pack_slowly(sums, nodes, sort_with_torch):
        experts = [group * size + place for group in groups for place in range(size)]
        copies = [(expert, 0) for expert in experts]
        while len(copies) < slots // nodes:
            counts = {expert: sum(1 for other, _ in copies if other == expert) for expert in experts}
            heaviest = max(experts, key=lambda expert: loads[expert] / np.float32(counts[expert]))
            copies.append((heaviest, counts[heaviest]))
        counts = {expert: sum(1 for other, _ in copies if other == expert) for expert in experts}
        shares = [loads[expert] / np.float32(counts[expert]) for expert, _ in copies]
        for items in pack_slowly(shares, gpus // nodes, sort_with_torch):
            held += [copies[item] for item in items]
    return held


@needs_torch
@given(st.data())
def test_the_reference_places_the_same(data: st.DataObject) -> None:
    nodes, gpus_per_node, groups_per_node, size, layers = (data.draw(st.integers(1, most)) for most in (3, 4, 3, 6, 2))
    gpus, experts = nodes * gpus_per_node, nodes * groups_per_node * size
    slots = gpus * (-(-experts // gpus) + data.draw(st.integers(0, 3)))
    row = st.lists(LOADS, min_size=experts, max_size=experts)
    weight = np.array(data.draw(st.lists(row, min_size=layers, max_size=layers)), np.float32)
    sums = np.array([[sum(group, np.float32(0)) for group in layer.reshape(-1, size)] for layer in weight], np.float32)
    phy2log, log2phy, logcnt = place_as_deepseek(weight, slots, nodes * groups_per_node, nodes, gpus, sums)
    for layer in range(layers):
        held = place_slowly(list(weight[layer]), list(sums[layer]), slots, nodes, gpus)
        assert phy2log[layer].tolist() == [expert for expert, _ in held]
        for expert in range(experts):
            ordered = [slot for _, slot in sorted((copy, slot) for slot, (other, copy) in enumerate(held) if other == expert)]
            assert logcnt[layer, expert] == len(ordered)
            assert log2phy[layer, expert].tolist() == ordered + [-1] * (logcnt.max() - len(ordered))


def test_nodes_that_do_not_divide_the_groups_count_as_one() -> None:
    weight = np.random.default_rng(0).lognormal(0, 1, (2, 30)).astype(np.float32)
    unread = np.ones((2, 5), np.float32)
    for found, expected in zip(
        place_as_deepseek(weight, 40, 5, 4, 8, unread), place_as_deepseek(weight, 40, 1, 1, 8), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def make_keys(rng: np.random.Generator, count: int, kind: str) -> Array:
    places = np.arange(count)
    if kind == "hill":
        keys = np.minimum(places, count - places) // rng.integers(1, 4)
    elif kind == "teeth":
        keys = places % rng.integers(1, count + 1)
    elif kind == "few":
        keys = rng.integers(0, rng.integers(1, 12), count)
    elif kind == "repeats":
        keys = np.repeat(rng.lognormal(0, 1.5, count), rng.integers(1, 4, count))[:count]
    else:
        keys = np.sort(rng.integers(0, max(1, count // 3), count))
        keys = keys[::-1] if kind == "falling" else keys
        keys[rng.integers(0, count, 3)] = rng.integers(0, count)
    return np.ascontiguousarray(keys, np.float32)


@needs_torch
@pytest.mark.parametrize("kind", ["hill", "teeth", "few", "repeats", "rising", "falling"])
def test_equal_keys_are_ordered_as_torch_does(kind: str) -> None:
    rng = np.random.default_rng(0)
    for count in [*range(1, 130), *rng.integers(130, 2049, 40).tolist(), 2048]:
        for keys in (make_keys(rng, count, kind), np.zeros(count, np.float32)):
            assert sort_descending(keys).tolist() == sort_with_torch(list(keys)), f"{kind}, {count} keys"


@pytest.mark.parametrize(
    ("shape", "sizes", "said"),
    [
        ((8,), (8, 1, 1, 2), r"weight of shape \(8,\); allowed: \[layers, experts\]"),
        ((0, 8), (8, 1, 1, 2), r"weight of shape \(0, 8\); allowed"),
        ((2, 8), (8, 1, 0, 2), "replicas, groups, nodes and GPUs of 8, 1, 0, 2; allowed: 1 or more of each"),
        ((2, 8), (6, 1, 1, 2), "6 replicas for 8 experts; allowed: 8 or more"),
        ((2, 8), (9, 3, 3, 3), "8 experts in 3 groups; allowed: a number of groups that divides the experts"),
        ((2, 8), (9, 2, 2, 3), "3 GPUs in 2 nodes; allowed: a number of nodes that divides the GPUs"),
        ((2, 8), (9, 2, 2, 2), "9 replicas in 2 GPUs; allowed: a number of GPUs that divides the replicas"),
    ],
)
def test_sizes_that_do_not_fit_are_told(shape: tuple[int, ...], sizes: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(BalanceError, match=said):
        place_as_deepseek(np.ones(shape, np.float32), *sizes)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e39])
def test_loads_that_are_none_are_told(value: float) -> None:
    weight = np.ones((2, 8))
    weight[1, 3] = value
    with pytest.raises(BalanceError, match="allowed: finite numbers, 0 or more"):
        place_as_deepseek(weight, 8, 1, 1, 2)


def test_group_sums_that_do_not_fit_are_told() -> None:
    weight = np.ones((2, 8), np.float32)
    with pytest.raises(BalanceError, match=r"group sums of shape \(2, 2\); allowed: numbers, \[2 layers, 4 groups\]"):
        place_as_deepseek(weight, 8, 4, 2, 2, np.ones((2, 2), np.float32))
    with pytest.raises(BalanceError, match="allowed: numbers"):
        place_as_deepseek(weight, 8, 4, 2, 2, np.full((2, 4), np.nan, np.float32))
