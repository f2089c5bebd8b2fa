"""The traffic of clones where no process group is needed to see that it is in order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.balance.placement import Placement, make_home_placement
from counterflow.moe import clones as module
from counterflow.moe.clones import Clones, LayerExperts, Traffic


class Work:
    """A transfer under way, until it is waited for."""

    def __init__(self, under_way: list["Work"]) -> None:
        self._under_way = under_way
        under_way.append(self)

    def wait(self) -> None:
        self._under_way.remove(self)


class Network:
    """Stands in for point-to-point transfers."""

    def __init__(self) -> None:
        self.under_way: list[Work] = []

    def start(self, operations: list[Any]) -> list[Work]:
        """Start a batch, one work for each operation."""
        return [Work(self.under_way) for _ in operations]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    # What `Clones` looks at in an operation that it sends is its tensor.
    monkeypatch.setattr(module.dist, "P2POp", lambda run, tensor, *_: SimpleNamespace(tensor=tensor))
    monkeypatch.setattr(module.dist, "batch_isend_irecv", network.start)
    monkeypatch.setattr(module.dist, "get_process_group_ranks", lambda group: list(range(group.size())))
    return network


def make_expert() -> list[torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.main_grad = torch.zeros(2, 2)  # type: ignore[attr-defined]
    return [weight]


def test_weights_that_no_token_asked_for_have_come_before_others_are_sent(network: Network) -> None:
    homes = make_home_placement(1, 4, 2, 1)
    assert homes.homes is not None
    # Rank 1 holds experts 2 and 3, and a clone of 0, then of 1.
    layer = LayerExperts([make_expert(), make_expert()], [make_expert()])
    clones = Clones([layer], 0, homes.cluster, SimpleNamespace(rank=lambda: 1, size=lambda: 2), Traffic())  # type: ignore[arg-type]
    for expert in (0, 1):
        held = homes.experts.copy()
        held[0, 5] = expert
        before = list(network.under_way)
        clones.refresh(Placement(homes.cluster, held, homes.homes), np.arange(6)[None] == 5)
        assert not any(work in network.under_way for work in before), "two homes write into one clone at once"
        assert len(network.under_way) == 1
    clones.finish_refresh(0)
    assert not network.under_way
