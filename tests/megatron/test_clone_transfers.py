"""What travels between homes and clones, with two ranks in one process: sends lie in a mailbox until they are waited for."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.balance.placement import Placement, make_home_placement
from counterflow.errors import BalanceError
from counterflow.megatron.gradients import GRADIENTS
from counterflow.moe import clones as moe_clones
from counterflow.moe.clones import Clones, LayerExperts, Traffic
from counterflow.moe.gradients import Defer, GradientStore, PlainGradients


class Work:
    """A transfer; nothing arrives before it is waited for."""

    def __init__(self, finish: Any) -> None:
        self._finish, self.is_done = finish, False

    def wait(self, *limit: Any) -> None:
        if not self.is_done:
            self._finish()
        self.is_done = True


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Stand in for torch.distributed; the list has every receive that was started."""
    started: list[Work] = []
    mail: dict[tuple[int, int, int], torch.Tensor] = {}

    def start(operations: list[Any]) -> list[Work]:
        for kind, tensor, peer, rank, tag in operations:
            if kind == "send":
                mail[rank, peer, tag] = tensor.clone()
        receives = [o for o in operations if o[0] == "receive"]
        begun = [Work(lambda o=o: o[1].copy_(mail.pop((o[2], o[3], o[4])))) for o in receives]
        started.extend(begun)
        return begun

    fake = SimpleNamespace(
        isend="send",
        irecv="receive",
        P2POp=lambda kind, tensor, peer, group, tag: (kind, tensor, peer, group.rank(), tag),
        batch_isend_irecv=start,
        get_process_group_ranks=lambda group: [0, 1],
    )
    monkeypatch.setattr(moe_clones, "dist", fake)
    monkeypatch.setattr(moe_clones, "find_timeout", lambda group: 1)
    return started


def make_expert(value: float, *, frozen: tuple[bool, ...], store: GradientStore) -> list[torch.nn.Parameter]:
    """Two weights of one expert; Megatron's data parallelism gives gradient buffers to those that are trained."""
    made = []
    for is_frozen in frozen:
        parameter = torch.nn.Parameter(torch.full((2,), value), requires_grad=not is_frozen)
        if not is_frozen and store is GRADIENTS:
            parameter.main_grad = torch.zeros(2)  # type: ignore[attr-defined]
        made.append(parameter)
    return made


def make_group(rank: int) -> Any:
    return SimpleNamespace(rank=lambda: rank)


def make_ranks(
    *, frozen: tuple[bool, ...], store: GradientStore = GRADIENTS, defer: Defer | None = None
) -> tuple[list[Clones], list[LayerExperts], Placement]:
    """Two ranks with one expert each; the placement has a clone of expert 0 on rank 1."""
    placement = make_home_placement(1, 2, 2, 1)
    layers = [
        LayerExperts(
            [make_expert(rank + 1.0, frozen=frozen, store=store)],
            [[torch.nn.Parameter(torch.full((2,), float("nan"))) for _ in frozen]],
        )
        for rank in range(2)
    ]
    made = [Clones([layers[r]], 0, placement.cluster, make_group(r), Traffic(), store, defer) for r in range(2)]
    experts = placement.experts.copy()
    experts[0, 3] = 0
    return made, layers, Placement(placement.cluster, experts, placement.homes)


@pytest.mark.parametrize("store", [GRADIENTS, PlainGradients()], ids=["megatron", "plain"])
@pytest.mark.parametrize("frozen", [(False, False), (True, False), (True, True)])
def test_frozen_weights_have_clones_without_gradients(works: list[Work], frozen: tuple[bool, ...], store: GradientStore) -> None:
    ranks, layers, placement = make_ranks(frozen=frozen, store=store)
    for rank in ranks:
        rank.refresh(placement, np.array([[False, False, False, True]]))
        rank.expect_gradients()
    assert ranks[1].finish_refresh(0)
    (clone,) = layers[1].clones
    assert [weight.tolist() for weight in clone] == [[1.0, 1.0], [1.0, 1.0]]
    assert [weight.requires_grad for weight in clone] == [not each for each in frozen]
    for weight in clone:
        if weight.requires_grad:
            (weight.sum() * 3).backward()
    for rank in ranks:
        rank.start_homecoming()
    for rank in ranks:
        rank.finish_homecoming()
    (home,) = layers[0].homes
    assert [store.of(weight) is None for weight in home] == list(frozen)
    assert all(store.of(weight).tolist() == [3.0, 3.0] for weight in home if weight.requires_grad)  # type: ignore[union-attr]
    # The next step begins at zero.
    ranks[1].expect_gradients()
    assert all(not store.of(weight).any() for weight in clone if weight.requires_grad)  # type: ignore[union-attr]


def test_weights_that_evaluation_did_not_use_have_come_before_it_ends(works: list[Work]) -> None:
    # A rank whose clone got no token never waits for its weights; the next step may change the home or send to the slot again.
    ranks, layers, placement = make_ranks(frozen=(False, False))
    for rank in ranks:
        rank.refresh(placement, np.array([[False, False, False, True]]))
    assert works and not any(work.is_done for work in works)
    for rank in ranks:
        rank.finish_transfers()
    assert all(work.is_done for work in works)
    # Whoever caches what it made of a clone's weights still has to know that they are others.
    assert ranks[1].finish_refresh(0) and not ranks[1].finish_refresh(0)


def test_weights_that_no_token_asked_for_have_come_before_others_are_sent(works: list[Work]) -> None:
    ranks, _, placement = make_ranks(frozen=(False, False))
    wanted = np.array([[False, False, False, True]])
    for rank in ranks:
        rank.refresh(placement, wanted)
    first = list(works)
    for rank in ranks:
        rank.refresh(placement, wanted)
    assert all(work.is_done for work in first), "two homes write into one clone at once"
    assert works != first


def test_gradients_leave_in_a_layers_last_backward_once_their_number_is_known(works: list[Work]) -> None:
    ranks, layers, placement = make_ranks(frozen=(False, False), defer=lambda call: call())
    (clone,), (home,) = layers[1].clones, layers[0].homes

    def run_step(backwards: int, microbatches: int | None = 2) -> list[int]:
        """Return how many transfers have begun behind each backward."""
        for rank in ranks:
            rank.refresh(placement, np.array([[False, False, False, True]]))
            rank.expect_gradients(microbatches)
        begun = []
        for _ in range(backwards):
            for weight in clone:
                GRADIENTS.of(weight).add_(1)  # type: ignore[union-attr]
            for rank in ranks:
                assert rank.has_any(0)
                rank.note_backward(0)
            begun.append(sum(not work.is_done for work in works))
        for rank in reversed(ranks):
            rank.finish_step()
        return begun

    # Two weights of the clone are on their way from the begin; nothing waits for them here.
    assert run_step(2) == [2, 2], "gradients left before it was known how often the layer runs"
    assert run_step(2) == [2, 4]
    assert run_step(2, microbatches=None) == [2, 2]
    assert run_step(4) == [2, 2, 2, 2]
    assert run_step(4) == [2, 2, 2, 4], "a layer that runs twice for each micro-batch"
    assert all(GRADIENTS.of(weight).tolist() == [14.0, 14.0] for weight in home)  # type: ignore[union-attr]
    with pytest.raises(BalanceError, match="runs more often for 2 micro-batches than the 4 times"):
        run_step(5)
