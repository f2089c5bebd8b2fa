"""What just-in-time clones send and share, with two ranks in one process: sends lie in a mailbox until they are waited for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from counterflow.balance.cluster import Cluster
from counterflow.balance.placement import EMPTY, Placement
from counterflow.errors import BalanceError
from counterflow.megatron.gradients import GRADIENTS
from counterflow.moe import just_in_time
from counterflow.moe.clones import LayerExperts, Traffic
from counterflow.moe.gradients import GradientStore, Part, PlainGradients, Weight
from counterflow.moe.just_in_time import JustInTime, Loan
from counterflow.runtime.weight_grads import defer_weight_grad, hold_weight_grads
from tests.support.running import refuses

LAYERS, HELD = 3, 2
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
    """Two ranks with `HELD` experts and as many shared slots each, in `LAYERS` layers; rank 1 clones the experts of rank 0.

    The weights of expert e of rank 0 in layer l are all l + 1 + 100 e.
    """

    def __init__(self, store: GradientStore, *, stacked: bool = False, pairs: bool = False, keeps: bool = False) -> None:
        self.store, self._stacked = store, stacked
        self.homes = [
            [self._make([layer + 1.0 + 100 * e + 10 * rank for e in range(HELD)]) for layer in range(LAYERS)] for rank in range(2)
        ]
        self.shared = [[self._make([float("nan")] * HELD) for _ in range(LAYERS)] for _ in range(2)]
        for home in (one for own in self.homes for experts in own for one in experts):
            if store is GRADIENTS:
                home.main_grad = torch.zeros_like(home)  # type: ignore[attr-defined]
        self.layers = [
            [LayerExperts(self._weigh(home), [], shared=self._weigh(own)) for home, own in zip(*both, strict=True)]
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
                keeps=keeps,
            )
            for rank in range(2)
        ]
        experts = np.array([[0, 1, EMPTY, EMPTY, 2, 3, 0, 1]])
        self.placement = Placement(Cluster((4, 4), (0, 0)), experts, np.array([[0, 1, 4, 5]]))

    def _make(self, values: list[float]) -> list[torch.nn.Parameter]:
        whole = torch.tensor(values)[:, None, None].repeat(1, 2, 2)
        return [torch.nn.Parameter(whole)] if self._stacked else [torch.nn.Parameter(one) for one in whole]

    def _weigh(self, parameters: list[torch.nn.Parameter]) -> list[list[Weight]]:
        return [[Part(parameters[0], e)] for e in range(HELD)] if self._stacked else [[one] for one in parameters]

    def lend(self, layer: int) -> list[Loan]:
        loans = [rank.lend(layer, self.placement, self.placement.experts[0] != EMPTY, HELD) for rank in self.ranks]
        assert all(loan is not None for loan in loans)
        return [loan for loan in loans if loan is not None]

    def forward(self, layer: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """Run a layer: on rank 1 each clone computes a row; return what each rank's backward begins with."""
        loans = self.lend(layer)
        inputs = [
            rank.give_back(loan, one)[0] for rank, loan, one in zip(self.ranks, loans, (torch.zeros(1, 2), rows), strict=True)
        ]

        def run(given: torch.Tensor) -> torch.Tensor:
            kept = self.shared[TAKER][layer]
            weights = list(kept[0]) if self._stacked else kept
            if self.store is GRADIENTS:
                return torch.stack([Multiply.apply(given[e : e + 1], weights[e])[0] for e in range(HELD)])  # type: ignore[no-untyped-call]
            return torch.stack([given[e] @ weights[e].t() for e in range(HELD)])

        outputs = [inputs[HOME], self.ranks[TAKER].compute(loans[TAKER], run, inputs[TAKER])]
        return [rank.recall(loan, one)[0] for rank, loan, one in zip(self.ranks, loans, outputs, strict=True)]

    def find_gradients(self, layer: int) -> list[float]:
        """Return the gradients of rank 0's experts, each of which has one value."""
        found = [self.store.of(weights[0]) for weights in self.layers[HOME][layer].homes]
        assert all(one is not None and one.unique().numel() == 1 for one in found)
        return [float(one[0, 0]) for one in found if one is not None]

    def finish(self) -> None:
        for rank in reversed(self.ranks):
            rank.finish_step()


def backward(outputs: list[torch.Tensor]) -> None:
    for output in outputs:
        output.sum().backward()  # type: ignore[no-untyped-call]


def make_rows(value: float) -> torch.Tensor:
    """Return a row for each clone, of twice the value for each clone further."""
    return (value * 2.0 ** torch.arange(HELD)[:, None].repeat(1, 2)).requires_grad_()


@STORES
@pytest.mark.parametrize("stacked", [False, True], ids=["parameters", "parts"])
@pytest.mark.parametrize("pairs", [False, True], ids=["one set", "two sets"])
def test_a_backward_computes_with_the_forwards_weights_again(
    sent: list[Any], store: GradientStore, stacked: bool, pairs: bool
) -> None:
    if stacked and store is GRADIENTS:
        pytest.skip("Megatron stacks no experts")
    ranks = Ranks(store, stacked=stacked, pairs=pairs)
    rows = [make_rows(1.0 + layer) for layer in range(LAYERS)]
    outputs = [ranks.forward(layer, rows[layer]) for layer in range(LAYERS)]
    for layer in reversed(range(LAYERS)):
        weights = [layer + 1.0 + 100 * e for e in range(HELD)]
        found = outputs[layer][TAKER][:, 0].tolist()
        assert found == [2 * (1.0 + layer) * 2**e * weight for e, weight in enumerate(weights)]
        backward(outputs[layer])
        gradient = rows[layer].grad
        assert gradient is not None
        assert gradient[:, 0].tolist() == [2 * weight for weight in weights], "computed with another layer's weights"
    ranks.finish()
    assert [ranks.find_gradients(layer) for layer in range(LAYERS)] == [[1.0 + layer, 2.0 + 2 * layer] for layer in range(LAYERS)]
    # Forwards and gradients of all layers; the last layer's weights were still there for its backward.
    weights_sent = LAYERS if pairs else LAYERS - 1
    senders = [rank for rank, _ in sent]
    assert senders.count(HOME) == HELD * (LAYERS + weights_sent) and senders.count(TAKER) == HELD * LAYERS


@STORES
@pytest.mark.parametrize("stacked", [False, True], ids=["parameters", "parts"])
@pytest.mark.parametrize("pairs", [False, True], ids=["one set", "two sets"])
def test_weights_that_are_kept_are_sent_once(sent: list[Any], store: GradientStore, stacked: bool, pairs: bool) -> None:
    if stacked and store is GRADIENTS:
        pytest.skip("Megatron stacks no experts")
    ranks = Ranks(store, stacked=stacked, pairs=pairs, keeps=True)
    memory = ranks.shared[TAKER][0][0].data_ptr()
    # Two micro-batches of every layer are under way.
    batches = [(batch, layer) for batch in range(2) for layer in range(LAYERS)]
    rows = {one: make_rows(1.0 + one[1]) for one in batches}
    outputs = {one: ranks.forward(one[1], rows[one]) for one in batches}
    for one in reversed(batches):
        backward(outputs[one])
        gradient = rows[one].grad
        assert gradient is not None
        weights = [one[1] + 1.0 + 100 * e for e in range(HELD)]
        assert gradient[:, 0].tolist() == [2 * weight for weight in weights], "computed with another layer's weights"
    ranks.finish()
    expected = [[2 * (1.0 + layer), 2 * (2.0 + 2 * layer)] for layer in range(LAYERS)]
    assert [ranks.find_gradients(layer) for layer in range(LAYERS)] == expected
    senders = [rank for rank, _ in sent]
    assert senders.count(HOME) == HELD * len(batches) == senders.count(TAKER)
    assert {one[0].data_ptr() for one in ranks.shared[TAKER]} == {memory}, "what was kept is kept for ever"
    assert ranks.ranks[TAKER].measure_kept() == LAYERS * HELD * 16


@pytest.mark.parametrize("keeps", [False, True], ids=["resend", "keep"])
@pytest.mark.parametrize("pairs", [False, True], ids=["one set", "two sets"])
def test_nothing_that_slots_hold_outlives_a_step(sent: list[Any], pairs: bool, keeps: bool) -> None:
    ranks = Ranks(GRADIENTS, pairs=pairs, keeps=keeps)
    for factor in (1.0, 10.0, 100.0):
        rows = make_rows(1.0)
        outputs = ranks.forward(0, rows)
        backward(outputs)
        assert outputs[TAKER][:, 0].tolist() == [2 * factor, 4 * 101 * factor], "a forward had weights of the last step"
        assert rows.grad is not None
        assert rows.grad[:, 0].tolist() == [2 * factor, 2 * 101 * factor], "a backward had weights of the last step"
        ranks.finish()
        with torch.no_grad():
            for home in ranks.homes[HOME][0]:
                home *= 10


def test_ranks_agree_on_what_is_sent_again_to_be_kept(sent: list[Any]) -> None:
    ranks = Ranks(GRADIENTS, keeps=True)
    there = ranks.placement
    back = Placement(there.cluster, np.array([[0, 1, 2, 3, 2, 3, EMPTY, EMPTY]]), there.homes)
    # Rank 0 keeps clones of rank 1; then rank 1 has clones of rank 0, first for a forward without gradients.
    for placement, taker, has_gradients in ((back, HOME, True), (there, TAKER, False), (there, TAKER, True)):
        with torch.set_grad_enabled(has_gradients):
            loans = [rank.lend(0, placement, placement.experts[0] != EMPTY, HELD) for rank in ranks.ranks]
            loan = loans[taker]
            assert loan is not None
            ranks.ranks[taker].receive(loan)
            ranks.ranks[taker].let_go(loan)
    assert len(sent) == 3 * HELD


@STORES
@pytest.mark.parametrize("order", ["I0 I1 W1 W0", "I0 W0 I1 W1"])
def test_weight_gradients_that_wait_are_sent_when_they_are_computed(sent: list[Any], store: GradientStore, order: str) -> None:
    ranks = Ranks(store)
    waiting: dict[str, list[Callable[[], None]]] = {}
    for kind, batch in order.split():
        if kind == "I":
            outputs = ranks.forward(0, make_rows(1.0 + int(batch)))
            with hold_weight_grads() as waiting[batch]:
                backward(outputs)
        else:
            for compute in waiting[batch]:
                compute()
    assert [rank for rank, _ in sent].count(TAKER) == 2 * HELD, "a loan has sent no gradient, or too many"
    ranks.finish()
    assert ranks.find_gradients(0) == [3.0, 6.0]


def test_a_checkpoint_does_not_run_the_layer_again_for_the_graph_of_the_clones(sent: list[Any]) -> None:
    ranks, runs = Ranks(PlainGradients(), stacked=True), []
    loan = ranks.lend(0)[TAKER]

    def run(given: torch.Tensor) -> torch.Tensor:
        weights = ranks.shared[TAKER][0][0]
        return torch.stack([given[e] @ weights[e].t() for e in range(HELD)])

    def layer(rows: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return ranks.ranks[TAKER].compute(loan, run, rows * rows) ** 2

    rows = make_rows(1.0)
    checkpoint(layer, rows, use_reentrant=False).sum().backward()
    assert len(runs) == 2
    # Of sum((2 w r^2)^2) over a row of two equal numbers r: each has 16 w^2 r^3.
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [16 * weight**2 * r**3 for weight, r in ((1.0, 1.0), (101.0, 2.0))]


def test_gradients_of_layers_have_two_memories_and_weights_one(sent: list[Any]) -> None:
    ranks = Ranks(GRADIENTS)
    memories = [layer[0].main_grad.data_ptr() for layer in ranks.shared[TAKER]]  # type: ignore[attr-defined]
    assert memories[0] == memories[2] != memories[1]
    assert len({layer[0].data_ptr() for layer in ranks.shared[TAKER]}) == 1
    # Four numbers an expert.
    assert ranks.ranks[TAKER].measure_memory() == (16 * HELD, 2 * 16 * HELD), "memory grows with the layers"


def test_slots_smaller_than_an_expert_are_refused(sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make = Ranks._make
    sizes = iter([2] * 2 * LAYERS + [1] * 2 * LAYERS)
    monkeypatch.setattr(Ranks, "_make", lambda *given: [torch.nn.Parameter(one[:, : next(sizes)]) for one in make(*given)])
    said = "a clone slot of torch.float32 and shape (1, 2) for an expert's weight of torch.float32 and shape (2, 2); allowed: "
    with refuses(said, BalanceError):
        Ranks(PlainGradients(), stacked=True)


def test_what_nobody_clones_sends_nothing(sent: list[Any]) -> None:
    ranks = Ranks(GRADIENTS)
    unused = np.array([True] * 6 + [False] * 2)
    assert [rank.lend(0, ranks.placement, unused, HELD) for rank in ranks.ranks] == [None, None]
    assert not sent


def test_the_rounds_of_a_return_go_on_as_other_layers_begin(sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(just_in_time, "arrange_rounds", lambda senders, receivers, ranks, most: np.arange(len(senders)))
    ranks = Ranks(PlainGradients())
    backward(ranks.forward(0, make_rows(1.0)))
    assert [rank for rank, _ in sent].count(TAKER) == 1, "gradients leave in rounds of one"
    ranks.lend(1)
    assert [rank for rank, _ in sent].count(TAKER) == 2, "no gradient leaves as the next layer begins"
    assert ranks.find_gradients(0) == [1.0, 0.0]
    ranks.finish()
    assert ranks.find_gradients(0) == [1.0, 2.0]
