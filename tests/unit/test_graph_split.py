"""A backward that is split in its graph gives autograd's gradients, bit for bit, and leaves to the W what can be left."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from counterflow.runtime.weight_grads import hold_weight_grads
from counterflow.trainer import splits

WIDTH = 8


class InPython(torch.autograd.Function):
    runs = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        InPython.runs += 1
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        return gradient @ weight.t(), x.flatten(0, 1).t() @ gradient.flatten(0, 1)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (WIDTH, WIDTH))) * 0.3)


class Layers(nn.Module):
    """Products of all kinds: weights used twice, by experts, by a function in Python, with a hook on what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.twice, self.python, self.hooked, self.summed, self.last = (
            matrix(5, WIDTH), matrix(), matrix(), matrix(), matrix(), matrix(),
        )  # fmt: skip
        self.experts, self.norm, self.linear = matrix(4, WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.places) @ self.twice
        x = self.linear(self.norm(x))
        x = torch.cat([x[one : one + 1] @ self.experts[one].t() for one in range(4)])
        y = x.flatten(0, 1) @ self.hooked
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 1.5)
        x = x + InPython.apply(y.view_as(x), self.python)
        x = x + self.attention(x, x, x)[0]
        x = torch.einsum("bsi,oi->bso", x, self.summed) + torch.einsum("bsi,oi->bso", x.tanh(), self.summed.sin())
        return (x @ self.twice.t()).tanh() @ self.last


LATE = {"experts", "places", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight", "summed", "last"}


def add(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    weight.grad = gradient if weight.grad is None else weight.grad + gradient


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.autograd, "backward", splits.split_backward(torch.autograd.backward))
    monkeypatch.setattr(torch.Tensor, "register_hook", splits.split_hooks(torch.Tensor.register_hook))
    return


def run(model: Any, x: torch.Tensor, graphs: splits.GraphSplits) -> tuple[list[Any], set[str]]:
    """Run an I and its W; return the gradients, and the names of the weights that the W computed."""
    model.zero_grad()
    x.grad = None
    with splits.note_hooks() as hooked:
        loss = model(x).square().mean()
    with hold_weight_grads() as queue, graphs.run(0, model.parameters, [x], hooked):
        loss.backward()
    early = {name for name, one in model.named_parameters() if one.grad is not None}
    gradient = x.grad
    for compute in queue:
        compute()
    late = {name for name, one in model.named_parameters() if one.grad is not None} - early
    return [gradient, *(one.grad for one in model.parameters())], late


def run_whole(model: Any, x: torch.Tensor) -> list[Any]:
    model.zero_grad()
    x.grad = None
    model(x).square().mean().backward()
    return [x.grad, *(one.grad for one in model.parameters())]


def begin(
    make: Callable[[], nn.Module], seed: int, *, has_input: bool
) -> tuple[Any, torch.Tensor, list[str], splits.GraphSplits]:
    torch.manual_seed(seed)
    model, x = make(), torch.randn(4, 5, WIDTH, requires_grad=has_input)
    for one in model.parameters():
        splits.note_weight(one, add, "deepspeed")
    said: list[str] = []
    return model, x, said, splits.GraphSplits(said.append)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("has_input", [True, False], ids=["inner stage", "first stage"])
def test_gradients_are_those_of_a_whole_backward(has_input: bool, seed: int) -> None:
    model, x, said, graphs = begin(Layers, seed, has_input=has_input)
    expected = run_whole(model, x)
    gradients, late = run(model, x, graphs)
    assert not late, "the first I, in which the choice is made, is whole"
    assert len(said) == 1 and "stage 0" in said[0]
    # Where no input needs a gradient, the lowest weight is what the I leads to.
    assert late_of(model, x, graphs, expected) == (LATE if has_input else LATE - {"places"})
    InPython.runs = 0
    run(model, x, graphs)
    assert InPython.runs == 1, "a function in Python may communicate, so it runs once"
    assert gradients[0] is None or torch.equal(gradients[0], expected[0])


def late_of(model: Any, x: torch.Tensor, graphs: splits.GraphSplits, expected: list[Any]) -> set[str]:
    for _ in range(2):
        gradients, late = run(model, x, graphs)
        for mine, theirs in zip(gradients, expected, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    return late


class Recomputed(nn.Module):
    def __init__(self, *, is_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.is_reentrant = Layers(), is_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.is_reentrant)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_what_is_recomputed_stays_whole(is_reentrant: bool) -> None:
    model, x, said, graphs = begin(lambda: Recomputed(is_reentrant=is_reentrant), 1, has_input=True)
    assert late_of(model, x, graphs, run_whole(model, x)) == set()
    assert not said


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_a_users_hook_on_a_weight_sees_every_gradient(kind: str) -> None:
    model, x, _, graphs = begin(Layers, 1, has_input=True)
    seen: list[torch.Tensor] = []
    weight = model.summed
    if kind == "gradient":
        weight.register_hook(lambda gradient: seen.append(gradient) or gradient * 2)
    else:
        weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad))
    assert late_of(model, x, graphs, run_whole(model, x)) == LATE - {"summed"}
    assert len(seen) == 3


@pytest.mark.usefixtures("installed")
def test_a_chunk_whose_weights_wait_already_is_not_split_in_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "linear", splits.split_linear(functional.linear))
    monkeypatch.setattr(torch, "matmul", splits.split_matmul(torch.matmul))
    model, x, said, graphs = begin(TensorParallel, 1, has_input=True)
    assert late_of(model, x, graphs, run_whole(model, x)) == {"up.weight", "down.weight", "linear.weight"}
    assert not said


class TensorParallel(nn.Module):
    """DeepSpeed's own linears, which multiply by `torch.matmul`."""

    def __init__(self) -> None:
        super().__init__()
        layers = pytest.importorskip("deepspeed.module_inject.layers")
        layers.set_autotp_mode(training=True)
        self.up = layers.LinearLayer(nn.Linear(WIDTH, WIDTH), None)
        self.down = layers.LinearAllreduce(nn.Linear(WIDTH, WIDTH), None)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.down(self.up(x).tanh()))  # type: ignore[no-any-return]
