"""What just-in-time clones send and share, with two ranks in one process: sends lie in a mailbox until they are waited for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement
from counterflow.megatron.gradients import GRADIENTS
from counterflow.moe import just_in_time
from counterflow.moe.clones import LayerExperts, Traffic
from counterflow.moe.gradients import GradientStore, Part, PlainGradients, Weight
from counterflow.moe.just_in_time import JustInTime, Loan
from counterflow.runtime.weight_grads import defer_weight_grad, hold_weight_grads

LAYERS = 3
HOME, TAKER = 0, 1
STORES = pytest.mark.parametrize("store", [GRADIENTS, PlainGradients()], ids=["megatron", "plain"])


class Work:
    """A transfer; nothing arrives before it is waited for."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish = finish

    def wait(self, *limit: Any) -> None:
        self._finish()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """Stand in for torch.distributed; the list has the sender and the tensor of every send."""
    sends: list[tuple[int, torch.Tensor]] = []
    mail: dict[tuple[int, int, int], torch.Tensor] = {}

    def start(operations: list[Any]) -> list[Work]:
        for kind, tensor, peer, rank, tag in operations:
            if kind == "send":
                assert (rank, peer, tag) not in mail, "two transfers with one tag are under way"
                mail[rank, peer, tag] = tensor.clone()
                sends.append((rank, tensor))
        receives = [o for o in operations if o[0] == "receive"]
        return [Work(lambda o=o: o[1].copy_(mail.pop((o[2], o[3], o[4])))) for o in receives]

    fake = SimpleNamespace(
        isend="send",
        irecv="receive",
        P2POp=lambda kind, tensor, peer, group, tag: (kind, tensor, peer, group.rank(), tag),
        batch_isend_irecv=start,
        get_process_group_ranks=lambda group: [0, 1],
    )
    monkeypatch.setattr(just_in_time, "dist", fake)
    monkeypatch.setattr(just_in_time, "find_limit", lambda group, layer: ())
    return sends


class Multiply(torch.autograd.Function):
    """A product with a parameter that is kept as it is, as in Megatron's linears."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(given, weight)
        return given @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        given, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ given


class Ranks:
    """Two ranks with one expert and one shared slot each, in `LAYERS` layers; the expert of rank 0 has weights of its layer."""

    def __init__(self, store: GradientStore, *, stacked: bool = False, pairs: bool = False) -> None:
        self.store, self._stacked = store, stacked
        self.homes = [[self._make(float(layer + 1 + 10 * rank)) for layer in range(LAYERS)] for rank in range(2)]
        self.shared = [[self._make(float("nan")) for _ in range(LAYERS)] for _ in range(2)]
        for home in (one for own in self.homes for one in own):
            if store is GRADIENTS:
                home.main_grad = torch.zeros_like(home)  # type: ignore[attr-defined]
        self.layers = [
            [LayerExperts([[self._weigh(home)]], [], shared=[[self._weigh(own)]]) for home, own in zip(*both, strict=True)]
            for both in zip(self.homes, self.shared, strict=True)
        ]
        self.ranks = [
            JustInTime(
                self.layers[rank],
                SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2),  # type: ignore[arg-type]
                Traffic(),
                store,
                defer_weight_grad,
                pairs=pairs,
            )
            for rank in range(2)
        ]
        cluster = Cluster((2, 2), (0, 0))
        self.placement = Placement(cluster, np.array([[0, EMPTY, 1, 0]]), np.array([[0, 2]]))

    def _make(self, value: float) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.full((1, 2, 2) if self._stacked else (2, 2), value))

    def _weigh(self, parameter: torch.nn.Parameter) -> Weight:
        return Part(parameter, 0) if self._stacked else parameter

    def lend(self, layer: int) -> list[Loan]:
        used = np.array([True, False, True, True])
        loans = [rank.lend(layer, self.placement, used, 1) for rank in self.ranks]
        assert all(loan is not None for loan in loans)
        return [loan for loan in loans if loan is not None]

    def forward(self, layer: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """Run a layer: rank 1 computes with its clone of rank 0's expert; return what each rank's backward begins with."""
        loans = self.lend(layer)
        weight = self.shared[TAKER][layer]
        inputs = [
            rank.give_back(loan, one)[0] for rank, loan, one in zip(self.ranks, loans, (torch.zeros(1, 2), rows), strict=True)
        ]

        def run(given: torch.Tensor) -> torch.Tensor:
            if self.store is GRADIENTS:
                return Multiply.apply(given, weight)  # type: ignore[no-any-return,no-untyped-call]
            return given @ (weight[0] if self._stacked else weight).t()

        outputs = [inputs[HOME], self.ranks[TAKER].compute(loans[TAKER], run, inputs[TAKER])]
        return [rank.recall(loan, one)[0] for rank, loan, one in zip(self.ranks, loans, outputs, strict=True)]

    def find_gradient(self, layer: int) -> list[Any]:
        gradient = self.store.of(self.layers[HOME][layer].homes[0][0])
        assert gradient is not None
        return gradient.tolist()  # type: ignore[no-any-return]

    def finish(self) -> None:
        for rank in reversed(self.ranks):
            rank.finish_step()


def backward(outputs: list[torch.Tensor]) -> None:
    for output in outputs:
        output.sum().backward()  # type: ignore[no-untyped-call]


@STORES
@pytest.mark.parametrize("stacked", [False, True], ids=["parameters", "parts"])
@pytest.mark.parametrize("pairs", [False, True], ids=["one set", "two sets"])
def test_a_backward_computes_with_the_forwards_weights_again(
    sent: list[Any], store: GradientStore, stacked: bool, pairs: bool
) -> None:
    if stacked and store is GRADIENTS:
        pytest.skip("Megatron stacks no experts")
    ranks = Ranks(store, stacked=stacked, pairs=pairs)
    rows = [torch.full((1, 2), 1.0 + layer, requires_grad=True) for layer in range(LAYERS)]
    outputs = [ranks.forward(layer, rows[layer]) for layer in range(LAYERS)]
    assert [one[TAKER].tolist() for one in outputs] == [[[2.0, 2.0]], [[8.0, 8.0]], [[18.0, 18.0]]]
    for layer in reversed(range(LAYERS)):
        backward(outputs[layer])
        gradient = rows[layer].grad
        assert gradient is not None and gradient.tolist() == [[2.0 * (layer + 1)] * 2], "computed with another layer's weights"
    ranks.finish()
    assert [ranks.find_gradient(layer) for layer in range(LAYERS)] == [[[1.0 + layer] * 2] * 2 for layer in range(LAYERS)]
    # Three forwards and their gradients; the last layer's weights were still there for its backward.
    weights = LAYERS if pairs else LAYERS - 1
    assert [rank for rank, _ in sent].count(HOME) == LAYERS + weights and [rank for rank, _ in sent].count(TAKER) == LAYERS


@STORES
def test_weight_gradients_that_wait_are_sent_when_they_are_computed(sent: list[Any], store: GradientStore) -> None:
    ranks = Ranks(store)
    rows = [torch.full((1, 2), 1.0 + batch, requires_grad=True) for batch in range(2)]
    waiting = []
    for batch in range(2):
        outputs = ranks.forward(0, rows[batch])
        with hold_weight_grads() as held:
            backward(outputs)
        waiting.append(held)
    sent.clear()
    for held in reversed(waiting):
        for compute in held:
            compute()
    gradients = [tensor for rank, tensor in sent if rank == TAKER]
    assert len(gradients) == 2
    ranks.finish()
    assert ranks.find_gradient(0) == [[3.0] * 2] * 2


def test_gradients_of_layers_have_two_memories_and_weights_one(sent: list[Any]) -> None:
    ranks = Ranks(GRADIENTS)
    memories = [one.main_grad.data_ptr() for one in ranks.shared[TAKER]]  # type: ignore[attr-defined]
    assert memories[0] == memories[2] != memories[1]
    assert len({one.data_ptr() for one in ranks.shared[TAKER]}) == 1
    assert ranks.ranks[TAKER].measure_memory() == (16, 32), "memory grows with the layers"


def test_what_nobody_clones_sends_nothing(sent: list[Any]) -> None:
    ranks = Ranks(GRADIENTS)
    unused = np.array([True, False, True, False])
    assert [rank.lend(0, ranks.placement, unused, 1) for rank in ranks.ranks] == [None, None]
    assert not sent
