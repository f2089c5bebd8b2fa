"""Tokens on slots: each routed pair once, in its slot's share, with the probabilities and gradients of the logical map."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.cluster import make_cluster
from counterflow.balance.placement import EMPTY, Placement, make_home_placement
from counterflow.balance.shares import share_tokens
from counterflow.errors import BalanceError, SeamError
from counterflow.megatron.experts.layer import KnownCounts, MegatronSlots, list_weights
from counterflow.moe.loads import LoadTracker, sum_by_tier
from counterflow.moe.reference import place_one_by_one
from counterflow.moe.slots import find_slots, make_slot_table, place_evenly, place_exactly, spread_evenly

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A layer's placement, and what each of its sources has routed: ``bool[sources, tokens, experts]``."""

    placement: Placement
    routed: Array
    rank_of_source: Array
    seed: int


@st.composite
def draw_cases(draw: st.DrawFn) -> Case:
    """Return homes anywhere, some slots empty, experts that a rank holds twice, tokens with no expert or with all."""
    ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slots = ranks * per_rank
    experts, sources = draw(st.integers(1, min(slots, 6))), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32))
    random = np.random.default_rng(seed)
    held = random.permutation(np.concatenate([np.arange(experts), random.integers(EMPTY, experts, slots - experts)]))
    homes = np.array([random.choice(np.flatnonzero(held == expert)) for expert in range(experts)])
    placement = Placement(make_cluster(ranks, slots), held[None], homes[None])
    routed = random.random((sources, draw(st.integers(0, 12)), experts)) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    return Case(placement, routed, random.integers(0, ranks, sources), seed)


def draw_probabilities(routed: Array, seed: int) -> torch.Tensor:
    """Return probabilities, among them infinities and NaN where nothing was routed, as a router's masked scores may be."""
    random = np.random.default_rng(seed)
    wild = random.choice([0.5, np.inf, -np.inf, np.nan], routed.shape)
    return torch.from_numpy(np.where(routed, random.random(routed.shape), wild).astype(np.float32)).requires_grad_()


def assert_placed(slot_map: torch.Tensor, slot_probs: torch.Tensor, probs: torch.Tensor, expected: Array, case: Case) -> None:
    """The map is the reference's; probabilities and their gradients are, bit for bit, those of the logical map."""
    held, routed = case.placement.experts[0], torch.from_numpy(expected)
    assert slot_map.dtype == torch.bool and (slot_map.numpy() == expected).all()
    # What each pair's expert output does to the loss does not depend on the slot that computes it.
    pull = torch.randn(probs.shape, generator=torch.Generator().manual_seed(case.seed % 2**32))
    logical_map = torch.zeros(probs.shape, dtype=torch.bool)
    for slot in np.flatnonzero(held != EMPTY):
        logical_map[:, held[slot]] |= routed[:, slot]
        chosen = routed[:, slot]
        assert torch.equal(slot_probs[chosen, slot], probs[chosen, held[slot]])
    assert not slot_probs.detach()[~routed].any(), "a probability where no token is"
    (gradient,) = torch.autograd.grad((slot_probs * pull[:, np.maximum(held, 0)])[routed].sum(), probs)
    (wanted,) = torch.autograd.grad((probs.masked_fill(~logical_map, 0.0) * pull)[logical_map].sum(), probs)
    assert torch.equal(gradient, wanted)


@given(draw_cases())
@settings(max_examples=150)
def test_the_exact_split_puts_every_pair_on_one_slot_and_meets_the_shares(case: Case) -> None:
    table = make_slot_table(case.placement, CPU)
    shares = share_tokens(case.routed.sum(1), case.placement, case.rank_of_source)
    for routed, ours in zip(case.routed, shares, strict=True):
        probs = draw_probabilities(routed, case.seed)
        slot_map, slot_probs = place_exactly(torch.from_numpy(routed), probs, table, ours)
        assert (slot_map.sum(0).numpy() == ours).all(), "the shares are not met"
        assert_placed(slot_map, slot_probs, probs, place_one_by_one(routed, case.placement.experts[0], ours), case)


@given(draw_cases())
@settings(max_examples=150)
def test_the_even_split_lets_an_experts_tokens_take_turns(case: Case) -> None:
    held = case.placement.experts[0]
    for routed in case.routed:
        probs = draw_probabilities(routed, case.seed)
        slot_map, slot_probs = place_evenly(torch.from_numpy(routed), probs, make_slot_table(case.placement, CPU))
        for expert in range(routed.shape[1]):
            dealt = slot_map[:, held == expert]
            assert (dealt.sum(1).numpy() == routed[:, expert]).all(), f"tokens of expert {expert} lost or made up"
            assert dealt.sum(0).max() - dealt.sum(0).min() <= 1, "not even"
        assert_placed(slot_map, slot_probs, probs, place_one_by_one(routed, held, None), case)


@given(draw_cases(), st.integers(1, 3))
@settings(max_examples=100)
def test_named_experts_are_found_in_the_slots_of_the_map(case: Case, chosen: int) -> None:
    held, experts = case.placement.experts[0], case.placement.homes.shape[1]  # type: ignore[union-attr]
    random = np.random.default_rng(case.seed)
    selected = np.stack([random.permutation(experts)[:chosen] for _ in range(case.routed.shape[1] + 1)])
    routed = np.zeros((len(selected), experts), np.bool_)
    np.put_along_axis(routed, selected, True, 1)
    table = make_slot_table(case.placement, CPU)
    slot_map, _ = place_evenly(torch.from_numpy(routed), torch.from_numpy(routed), table)
    slots = find_slots(torch.from_numpy(selected), slot_map, table).numpy()
    assert (held[slots] == selected).all(), "another expert"
    assert slot_map.numpy()[np.arange(len(selected))[:, None], slots].all(), "a slot that does not have the token"


@pytest.mark.parametrize(("tokens", "experts", "width"), [(32, 8, 2), (7, 16, 3), (5, 4, 4)])
def test_forced_routing_gives_all_experts_as_many_tokens(tokens: int, experts: int, width: int) -> None:
    routed = torch.zeros(tokens, experts, dtype=torch.bool)
    routed[:, :width] = True
    spread = [spread_evenly(routed, source) for source in range(experts)]
    assert all((one.sum(1) == width).all() for one in spread), "a token goes to fewer experts, or to one twice"
    assert sum(one.sum(0) for one in spread).tolist() == [tokens * width] * experts  # type: ignore[union-attr]
    assert all(one.sum(0).max() - one.sum(0).min() <= 1 for one in spread)


def test_a_second_deal_of_the_same_tokens_is_the_same() -> None:
    placement = Placement(make_cluster(2, 6), np.array([[0, 1, 2, 2, 3, 0]]), np.array([[0, 1, 3, 4]]))
    routed = np.random.default_rng(1).random((2, 40, 4)) < [1.0, 0.5, 0.2, 0.2]
    deals = []
    for _ in range(2):
        shares = share_tokens(routed.sum(1), placement, np.arange(2))
        probs = torch.ones(routed.shape[1:])
        deals.append(place_exactly(torch.from_numpy(routed[1]), probs, make_slot_table(placement, CPU), shares[1])[0])
    assert torch.equal(*deals), "recomputed, a token would find other weights, and other saved activations"
    assert deals[0][:, 5].any(), "the clone was not used"


def test_homes_alone_leave_the_logical_map() -> None:
    placement = make_home_placement(1, 4, 2, 1)
    routed = torch.rand(9, 4) < 0.5
    probs = torch.rand(9, 4)
    table = make_slot_table(placement, CPU)
    shares = share_tokens(routed.sum(0).numpy()[None], placement, np.zeros(1, np.int64))
    for slot_map, slot_probs in (place_exactly(routed, probs, table, shares[0]), place_evenly(routed, probs, table)):
        assert torch.equal(slot_map[:, [0, 1, 3, 4]], routed) and not slot_map[:, [2, 5]].any()
        assert torch.equal(slot_probs[:, [0, 1, 3, 4]], probs * routed)


def test_loads_come_by_micro_batch_and_layer_and_are_forgotten(alone: dist.ProcessGroup) -> None:
    tracker = LoadTracker(2)
    random = np.random.default_rng(2)
    experts, ranks, tiers = (random.integers(0, 9, (3, 2, size)) for size in (4, 2, 3))
    # Layer by layer, as under a schedule whose later chunk starts before the first has run all its micro-batches.
    for layer, microbatch in ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2)):
        tracker.add(layer, experts[microbatch, layer], ranks[microbatch, layer], tiers[microbatch, layer])
    taken = tracker.take(3, alone)
    assert (taken.experts == experts).all() and taken.ranks is not None and (taken.ranks == ranks).all()
    assert taken.tiers is not None and (taken.tiers == tiers).all()
    tracker.add(0, experts[0, 0], ranks[0, 0], tiers[0, 0])
    tracker.forget()
    for layer in range(2):
        tracker.add(layer, experts[1, layer], ranks[1, layer], tiers[1, layer])
    assert (tracker.take(1, alone).experts == experts[1:2]).all(), "the step that did not end was counted"


def test_clones_without_tokens_are_not_called_and_nothing_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a clone without tokens computes")

    slots = MegatronSlots.__new__(MegatronSlots)
    slots._own, slots._per_rank, slots._just_in_time = 2, 1, None
    slots.clone_module, slots.dealt = fail, SimpleNamespace(loan=None)  # type: ignore[assignment]
    tokens, probs = torch.ones(5, 3), torch.ones(5)
    given = []

    def run_homes(*parts: torch.Tensor) -> tuple[torch.Tensor, None]:
        given.append(parts[0])
        return parts[0], None

    with monkeypatch.context() as patch:
        patch.setattr(torch, "split", fail)
        patch.setattr(torch, "cat", fail)
        slots.run_experts(run_homes, tokens, torch.tensor([3, 2, 0]), probs)
    assert given == [tokens], "homes get the tokens as they are"
    monkeypatch.setattr(slots, "finish_refresh", lambda: False)
    slots._packing = None
    with pytest.raises(AssertionError, match="a clone without tokens computes"):
        slots.run_experts(run_homes, tokens, torch.tensor([3, 1, 1]), probs)


@pytest.mark.parametrize(("resident", "lent"), [(3, 0), (1, 2), (0, 3), (0, 0)])
def test_gradients_of_clones_leave_before_homes_compute_theirs(resident: int, lent: int) -> None:
    order: list[str] = []

    def note(name: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for tensor in tensors[:1]:
            tensor.register_hook(lambda _: order.append(name))
        return tensors

    def run(name: str) -> Callable[..., tuple[torch.Tensor, None]]:
        def run_part(tokens: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, None]:
            return note(name, tokens.clone())[0] * probs[:, None], None

        return run_part

    slots = MegatronSlots.__new__(MegatronSlots)
    slots._own, slots._per_rank, slots._packing = 2, 1, None
    slots.clone_module, slots.shared_module, slots.dealt = run("resident"), run("lent"), SimpleNamespace(loan="a loan")  # type: ignore[assignment]
    slots._just_in_time = SimpleNamespace(  # type: ignore[assignment]
        give_back=lambda loan, *tensors: note("sent", *(tensor.clone() for tensor in tensors)),
        compute=lambda loan, compute, *given, leave: compute(*given),
    )
    slots._clones_index, slots.is_sent_early = 0, True
    slots._clones = SimpleNamespace(  # type: ignore[assignment]
        has_any=lambda layer: True,
        note_backward=lambda layer: order.append("resident sent"),
        note_end=lambda: order.append("end"),
    )
    slots.finish_refresh = lambda: False  # type: ignore[method-assign]
    slots.leave_weight_grads = lambda: order.append("handed over")  # type: ignore[method-assign]
    tokens, probs = torch.ones(5 + resident + lent, 3, requires_grad=True), torch.ones(5 + resident + lent)
    output, _ = slots.run_experts(run("homes"), tokens, torch.tensor([3, 2, resident, lent]), probs)
    output.sum().backward()
    # A rank with clones sends when they have computed, the others take in before their homes compute; in one order on all ranks.
    wanted = ["lent"] * (lent > 0) + ["sent"] + ["resident"] * (resident > 0) + ["resident sent", "homes", "handed over", "end"]
    assert order == wanted


def test_tokens_are_counted_at_homes_and_by_either_kind_of_clones() -> None:
    # Experts 0 and 1 at home on slots 0 and 3; a clone of 1 stays on slot 1, one of 0 is of this micro-batch alone.
    standing = Placement(make_cluster(2, 6), np.array([[0, 1, -1, 1, -1, -1]]), np.array([[0, 3]]))
    planned = Placement(make_cluster(2, 6), np.array([[0, 1, -1, 1, 0, -1]]), np.array([[0, 3]]))
    tokens = np.array([[5, 7, 0, 11, 13, 0], [1, 0, 0, 0, 0, 0]])
    assert sum_by_tier(tokens, planned, standing).tolist() == [[16, 7, 13], [1, 0, 0]]


def test_own_loads_are_summed_where_the_ranks_are_not_known(alone: dist.ProcessGroup) -> None:
    tracker = LoadTracker(2)
    for layer in range(2):
        for microbatch in range(3):
            tracker.add_own(layer, torch.tensor([layer, microbatch]))
    taken = tracker.take(3, alone)
    assert taken.ranks is None
    assert taken.experts.tolist() == [[[layer, microbatch] for layer in range(2)] for microbatch in range(3)]


def test_a_layer_that_runs_twice_in_a_micro_batch_counts_both(alone: dist.ProcessGroup) -> None:
    tracker = LoadTracker(1)
    for count in (1, 2, 10, 20):
        tracker.add(0, np.array([count, 0]), np.array([count]), np.zeros(3, np.int64))
    assert tracker.take(2, alone).experts.tolist() == [[[3, 0]], [[30, 0]]]


def test_a_layer_that_reported_nothing_has_no_load(alone: dist.ProcessGroup) -> None:
    tracker = LoadTracker(2)
    for count in (1, 2):
        tracker.add(1, np.array([count, 0]), np.array([count]), np.zeros(3, np.int64))
    assert tracker.take(2, alone).experts.tolist() == [[[0, 0], [1, 0]], [[0, 0], [2, 0]]]
    tracker.add_own(0, torch.tensor([5, 6]))
    assert tracker.take(1, alone).experts.tolist() == [[[5, 6], [0, 0]]]
    with pytest.raises(BalanceError, match="no MoE layer reported loads"):
        tracker.take(1, alone)


class GroupedLinear(torch.nn.Module):
    """Parameters as Transformer Engine's GroupedLinear names them."""

    def __init__(self, experts: int, shape: tuple[int, int], *, bias: bool) -> None:
        super().__init__()
        for index in range(experts):
            self.register_parameter(f"weight{index}", torch.nn.Parameter(torch.full(shape, float(index))))
            if bias:
                self.register_parameter(f"bias{index}", torch.nn.Parameter(torch.full(shape[:1], float(index))))


@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_grouped_linears_are_found_by_expert(bias: bool) -> None:
    experts = torch.nn.Module()
    # More than ten: weight1 is not to be taken for weight10.
    experts.linear_fc1, experts.linear_fc2 = (GroupedLinear(12, shape, bias=bias) for shape in ((6, 4), (4, 3)))
    found = list_weights(experts, 12)
    shapes = [(6, 4), (6,), (4, 3), (4,)] if bias else [(6, 4), (4, 3)]
    for index, weights in enumerate(found):
        assert [tuple(weight.shape) for weight in weights] == shapes
        assert all((weight == index).all() for weight in weights), f"expert {index} has another's weights"
    assert {id(weight) for weights in found for weight in weights} == {id(weight) for weight in experts.parameters()}


def test_weights_of_a_sequence_of_experts_are_found_by_expert() -> None:
    experts = torch.nn.Module()
    experts.local_experts = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(3))
    assert [weights[0] for weights in list_weights(experts, 3)] == [expert.weight for expert in experts.local_experts]


@pytest.mark.parametrize("module", [torch.nn.Module(), SimpleNamespace(linear_fc1=torch.nn.Linear(2, 2))])
def test_experts_of_another_shape_are_refused(module: object) -> None:
    with pytest.raises(SeamError, match="keeps its weights neither as local_experts nor as linear_fc1.weight0"):
        list_weights(module, 2)


def test_a_known_gather_is_answered_once_and_must_be_asked_for() -> None:
    asked = []
    known = KnownCounts()
    gather = known.answer_gather(lambda counts, group=None: asked.append(counts))
    counts = torch.arange(6).view(2, 3)
    with known.hold(counts):
        assert gather(counts[0], group=None).tolist() == list(range(6))
        gather(counts[0])
    assert len(asked) == 1, "the second gather is the dispatcher's own"
    with pytest.raises(SeamError, match="gathers no counts"), known.hold(counts):
        pass
    with pytest.raises(SeamError, match=r"gathers \(2,\) first where \(3,\) counts"), known.hold(counts):
        gather(counts[0, :2])
    gather(counts[0])
    assert len(asked) == 2, "an error left an answer behind"
