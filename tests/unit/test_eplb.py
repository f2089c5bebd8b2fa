"""`rebalance_experts` in the place of EPLB's: the same maps where asked for, never less balanced elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance import rebalance_experts
from counterflow.balance.cluster import make_cluster
from counterflow.balance.eplb import find_doubles, find_slowest
from counterflow.balance.planning import POLICIES
from tests.support.running import run_python


def check_maps(maps: tuple[Array, Array, Array], experts: int) -> None:
    """The three maps say the same, and every expert has a replica."""
    replicas, slots, counts = maps
    layers = len(replicas)
    assert (counts >= 1).all() and slots.shape == (layers, experts, counts.max())
    for layer in range(layers):
        for expert in range(experts):
            held = slots[layer, expert]
            assert (held >= 0).sum() == counts[layer, expert] and (held[counts[layer, expert] :] == -1).all()
            assert (replicas[layer, held[held >= 0]] == expert).all()
        assert sorted(slots[layer][slots[layer] >= 0].tolist()) == list(range(replicas.shape[1]))


@st.composite
def draw_cases(draw: st.DrawFn) -> tuple[Array, tuple[int, int, int, int]]:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    gpus = nodes * per_node
    groups = draw(st.sampled_from([nodes, 2 * nodes, nodes + 1, 1]))
    experts = groups * draw(st.integers(1, 5))
    replicas = gpus * (-(-experts // gpus) + draw(st.integers(0, 2)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["lognormal", "ties", "one hot"]))
    weight = random.lognormal(0, 1.5, (2, experts)) if kind == "lognormal" else random.integers(0, 4, (2, experts)).astype(float)
    weight[:, 0] += 1000 if kind == "one hot" else 1
    return weight, (replicas, groups, nodes, gpus)


@given(draw_cases())
@settings(max_examples=300, deadline=None)
def test_no_layer_is_less_balanced_than_under_deepseek_and_groups_stay_on_nodes(
    case: tuple[Array, tuple[int, int, int, int]],
) -> None:
    weight, sizes = case
    replicas, groups, nodes, gpus = sizes
    cluster = make_cluster(gpus, replicas, nodes)
    theirs = rebalance_experts(weight, *sizes, policy="deepseek")
    for policy in ("auto", "global") + (("spill",) if groups % nodes == 0 else ()):
        ours = rebalance_experts(weight, *sizes, policy=policy)
        check_maps(ours, weight.shape[1])
        assert (find_slowest(weight, cluster, ours[0]) <= find_slowest(weight, cluster, theirs[0]) * (1 + 1e-12)).all()
        if policy == "auto" and groups % nodes == 0:
            size = weight.shape[1] // groups
            for held in ours[0]:
                for group in range(groups):
                    assert len(set(cluster.node_of_slot[held // size == group].tolist())) == 1, "a group on two nodes"
    own = weight.shape[1] // (nodes if groups % nodes == 0 else 1)
    if replicas // gpus <= own:
        assert not find_doubles(cluster, rebalance_experts(weight, *sizes, distinct=True)[0]).any()
    else:
        with pytest.raises(ValueError, match="no more slots on a rank than experts"):
            rebalance_experts(weight, *sizes, distinct=True)


def test_deepseek_equals_the_recording_for_arrays_and_tensors(shared_data: Path) -> None:
    torch = pytest.importorskip("torch")
    with np.load(shared_data / "eplb_reference.npz") as recorded:
        for case in sorted({name.rsplit("_", 1)[0] for name in recorded.files}):
            sizes = [int(number) for number in recorded[f"{case}_args"]]
            expected = [recorded[f"{case}_{name}"] for name in ("phy2log", "log2phy", "logcnt")]
            weight = recorded[f"{case}_weight"]
            for maps in (
                rebalance_experts(weight, *sizes, policy="deepseek"),
                rebalance_experts(torch.from_numpy(weight), *sizes, policy="deepseek"),
            ):
                for name, found, wanted in zip(("replicas", "slots", "counts"), maps, expected, strict=True):
                    assert isinstance(found, type(maps[0])) and found.shape == wanted.shape, (case, name)
                    assert (np.asarray(found) == wanted).all(), (case, name)


def test_tensors_bring_tensors_and_arrays_bring_arrays() -> None:
    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(0).lognormal(0, 1, (3, 16))
    arrays = rebalance_experts(weight, 24, 4, 2, 4)
    tensors = rebalance_experts(torch.from_numpy(weight).bfloat16().requires_grad_(), 24, 4, 2, 4)
    assert all(isinstance(found, np.ndarray) and found.dtype == np.int64 for found in arrays)
    assert all(isinstance(found, torch.Tensor) and found.dtype == torch.int64 for found in tensors)
    assert [found.shape[:2] for found in arrays] == [tuple(found.shape[:2]) for found in tensors]


@pytest.mark.slow
def test_arrays_do_not_import_torch() -> None:
    code = (
        "import sys, numpy as np; from counterflow.balance import rebalance_experts; "
        "rebalance_experts(np.ones((1, 8)), 12, 2, 2, 4); rebalance_experts(np.ones((1, 8)), 12, 2, 2, 4, policy='deepseek'); "
        "print('torch' in sys.modules)"
    )
    assert run_python("-c", code).strip() == "False"


def test_deepseeks_own_plan_cannot_be_asked_for_without_doubles() -> None:
    with pytest.raises(ValueError, match="distinct under policy deepseek"):
        rebalance_experts(np.array([[8.0, 1.0]]), 4, 1, 1, 2, policy="deepseek", distinct=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_layer_without_load_is_planned_as_eplb_does(policy: str, kind: str) -> None:
    weight: Any = np.array([[0, 0, 0, 0], [4, 3, 2, 1]], np.float32)
    if kind == "torch":
        weight = pytest.importorskip("torch").from_numpy(weight)
    # What deepseek-ai/EPLB returns; of layers alone, padded to the widest.
    replicas, slots, counts = (np.asarray(found) for found in rebalance_experts(weight, 6, 2, 2, 2, policy=policy))
    assert replicas[0].tolist() == [0, 1, 0, 2, 3, 2] and counts[0].tolist() == [2, 1, 2, 1]
    assert slots[0].tolist() == [[0, 2], [1, -1], [3, 5], [4, -1]]
    check_maps((replicas, slots, counts), 4)
    alone = [np.asarray(found).tolist() for found in rebalance_experts(weight[:1], 6, 2, 2, 2, policy=policy)]
    assert alone == [[[0, 1, 0, 2, 3, 2]], [[[0, 2], [1, -1], [3, 5], [4, -1]]], [[2, 1, 2, 1]]]


def test_a_layer_without_load_has_no_expert_twice_on_a_gpu_where_that_is_asked_for() -> None:
    maps = rebalance_experts(np.zeros((1, 8)), 12, 1, 1, 4, distinct=True)
    check_maps(maps, 8)
    assert not find_doubles(make_cluster(4, 12), maps[0]).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", ["deepseek", "auto"])
def test_loads_that_float32_cannot_hold_are_refused_without_a_warning(policy: str) -> None:
    with pytest.raises(ValueError, match="weight from 1.0 to inf as float32"):
        rebalance_experts(np.array([[1e60, 1.0]]), 2, 1, 1, 1, policy=policy)


@pytest.mark.parametrize(
    ("weight", "sizes", "said"),
    [
        (-np.ones((1, 8)), (8, 1, 1, 4), "-1"),
        (np.array([[1.0, np.nan]]), (2, 1, 1, 1), "nan"),
        (np.ones((1, 2, 3, 4)), (8, 1, 1, 4), "shape"),
        (np.ones((1, 8)), (4, 1, 1, 4), "4 slots for 8 experts"),
        (np.ones((1, 8)), (10, 1, 1, 4), "10 slots on 4 ranks"),
        (np.ones((1, 8)), (8, 3, 1, 4), "3 groups of 8 experts"),
        (np.ones((1, 8)), (8, 3, 3, 4), "4 ranks on 3 nodes"),
        (np.ones((1, 8)), (8, 0, 1, 4), "groups 0 given"),
        (np.ones((1, 8)), (8, 1, 1, 0), "GPUs 0 given"),
        (np.ones((1, 8)), (8.5, 1, 1, 4), "replicas 8.5 given"),
        (np.ones((1, 8)), (8, 1, "2", 4), "nodes 2 given"),
        (np.ones((1, 8)), (8, None, 1, 4), "groups None given"),
        (np.ones((1, 8)), (10**30, 1, 1, 4), "replicas 1000000000000000000000000000000 given"),
        ([["x"]], (8, 1, 1, 4), "type <U1"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_was_given(weight: Any, sizes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        rebalance_experts(weight, *sizes)
    assert "allowed" in str(caught.value) and "\n" not in str(caught.value)
