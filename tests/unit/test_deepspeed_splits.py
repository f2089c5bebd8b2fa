"""Weight gradients that wait for a W are those that autograd computes, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from counterflow.runtime.weight_grads import hold_weight_grads
from counterflow.trainer import splits

LAYERS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": ("linear", lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": ("linear", lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "embedding": ("embedding", lambda: nn.Embedding(9, 5), (3, 7)),
    "padded embedding": ("embedding", lambda: nn.Embedding(9, 5, padding_idx=-3, scale_grad_by_freq=True), (3, 7)),
    "conv1d": ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": ("conv2d", lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), (2, 4, 8, 9)),
    "conv3d": ("conv3d", lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 4, 4)),
}
WHOLE: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "sparse": ("embedding", lambda: nn.Embedding(9, 5, sparse=True), (3, 7)),
    "norm": ("embedding", lambda: nn.Embedding(9, 5, max_norm=0.5), (3, 7)),
    "named padding": ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
    "no batch": ("conv1d", lambda: nn.Conv1d(4, 6, 3), (4, 9)),
}


def add(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    weight.grad = gradient if weight.grad is None else weight.grad + gradient


def draw_input(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(9, shape) if name == "embedding" else torch.randn(shape, requires_grad=True)


def take_gradients(layer: nn.Module, given: torch.Tensor) -> list[torch.Tensor | None]:
    found = [given.grad, *(parameter.grad for parameter in layer.parameters())]
    given.grad = None
    layer.zero_grad(set_to_none=True)
    return found


def assert_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine.to_dense(), theirs.to_dense())


def run_both(case: tuple[str, Callable[[], nn.Module], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the layer, its input, autograd's gradients, and the work that an I left."""
    name, make, shape = case
    torch.manual_seed(1)
    layer: Any = make()
    given = draw_input(name, shape)
    start = torch.randn_like(layer(given))
    layer(given).backward(start)
    expected = take_gradients(layer, given)
    splits.note_weight(layer.weight, add, "deepspeed")
    monkeypatch.setattr(functional, name, getattr(splits, f"split_{name}")(getattr(functional, name)))
    with hold_weight_grads() as queue:
        layer(given).backward(start)
    return layer, given, start, expected, queue


@pytest.mark.parametrize("case", LAYERS)
def test_a_weight_gradient_waits_for_the_w(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, start, expected, queue = run_both(LAYERS[case], monkeypatch)
    assert len(queue) == 1 and layer.weight.grad is None, "the I computed it"
    queue[0]()
    assert_equal(take_gradients(layer, given), expected)
    # Outside an I, as in a B.
    layer(given).backward(start)
    assert_equal(take_gradients(layer, given), expected)


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_split_is_computed_in_the_i(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, _, expected, queue = run_both(WHOLE[case], monkeypatch)
    assert not queue
    assert_equal(take_gradients(layer, given), expected)
