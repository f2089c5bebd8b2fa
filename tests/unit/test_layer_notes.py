"""Layers in a profiler's trace: forward, backward, what is computed again, weight gradients; and nothing of it afterwards."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from counterflow.analysis.kineto import read_kineto
from counterflow.runtime.handover import HandOver
from counterflow.runtime.weight_grads import defer_weight_grad, hold_weight_grads
from counterflow.schedule.actions import Action
from counterflow.schedule.annotations import read_layer
from counterflow.trainer.layer_notes import LayerNotes

# An annotation: layer and letter, begin and end in nanoseconds.
Note = tuple[str, int, int]


class Product(torch.autograd.Function):
    """x * w, whose weight gradient can wait."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        weight, grad = ctx.weight, grads[0]

        def compute() -> None:
            weight.sum_of_grads = getattr(weight, "sum_of_grads", 0.0) + (grad * x).sum(0)

        defer_weight_grad(compute)
        return grad * weight.detach(), None


class Layer(nn.Module):
    """A layer as trainers have them: its input by name, a tuple for its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.tanh(Product.apply(hidden, self.weight)) + hidden, None


def make_layers(seed: int) -> dict[str, Layer]:
    torch.manual_seed(seed)
    return {name: Layer(5) for name in ("3", "4", "mtp 1")}


def run(layers: dict[str, Layer], x: torch.Tensor, *, again: bool = False) -> None:
    """Run forward, an I and its W."""
    hidden = x.requires_grad_()
    for layer in layers.values():
        hidden = (
            checkpoint(lambda h, one=layer: one(hidden=h)[0], hidden, use_reentrant=True) if again else layer(hidden=hidden)[0]
        )
    with hold_weight_grads() as queue:
        (hidden * hidden).sum().backward()
    for compute in queue:
        compute()


def _call(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    return layer(hidden=hidden)[0]  # type: ignore[no-any-return]


def list_notes(made: Any, path: Path) -> list[Note]:
    """Return the annotations of layers in order of time."""
    made.export_chrome_trace(str(path))
    trace = read_kineto(path)
    rows = zip(trace.ranges.name.tolist(), trace.ranges.start.tolist(), trace.ranges.end.tolist(), strict=True)
    known = [(read_layer(trace.names[name]), start, end) for name, start, end in rows]
    return sorted(((" ".join(one), start, end) for one, start, end in known if one), key=lambda note: note[1:])


def count_hooks(layers: dict[str, Layer]) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks) for one in layers.values())


@pytest.mark.parametrize("again", [False, True])
def test_layers_are_noted_one_after_the_other_and_change_nothing(again: bool, tmp_path: Path) -> None:
    results = []
    for is_noted in (False, True):
        layers, notes, x = make_layers(1), LayerNotes(), torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
        if is_noted:
            notes.attach(layers)
        with profile(activities=[ProfilerActivity.CPU]) as made:
            run(layers, x, again=again)
        notes.close()
        notes.detach()
        found = list_notes(made, tmp_path / "t.json")
        assert count_hooks(layers) == 0, "hooks are left behind"
        results.append([x.grad, *(layer.weight.sum_of_grads for layer in layers.values())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), "notes change gradients"
    assert all(first[2] <= second[1] for first, second in zip(found, found[1:], strict=False)), "two layers are open at once"
    back = [f"{name} B" for name in ("mtp 1", "4", "3") for _ in range(2 if again else 1)]
    assert [name for name, _, _ in found] == ["3 F", "4 F", "mtp 1 F", *back, "mtp 1 W", "4 W", "3 W"]


def test_without_notes_there_are_no_annotations(tmp_path: Path) -> None:
    layers, notes = make_layers(1), LayerNotes()
    notes.attach(layers)
    notes.detach()
    with profile(activities=[ProfilerActivity.CPU]) as made:
        run(layers, torch.randn(2, 5))
    assert list_notes(made, tmp_path / "t.json") == []


def test_a_layer_ends_where_its_part_of_a_pair_hands_over(tmp_path: Path) -> None:
    layers, notes = make_layers(4), LayerNotes()
    handover, turns = HandOver([notes.carried]), Counter[str]()

    class Exchanging(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            from counterflow.runtime import communicate

            with torch.profiler.record_function("before"):
                pass
            communicate(lambda: None, lambda _: None)
            with torch.profiler.record_function("after"):
                pass
            return hidden * 2

    both = {"1": Exchanging(), "2": Exchanging()}
    notes.attach({**layers, **both})

    def run_one(name: str) -> None:
        both[name](torch.ones(2))
        turns[name] += 1

    with profile(activities=[ProfilerActivity.CPU], experimental_config=_all_threads()) as made:
        handover.run_pair(Action("F", 1, 0), lambda: run_one("1"), Action("B", 0, 0), lambda: run_one("2"))
    notes.detach()
    found = list_notes(made, tmp_path / "t.json")
    assert turns == {"1": 1, "2": 1}
    assert all(first[2] <= second[1] for first, second in zip(found, found[1:], strict=False)), "two layers are open at once"
    # The B begins; each hands over once, and goes on with its own layer.
    assert [name for name, _, _ in found] == ["2 F", "1 F", "2 F", "1 F"]


def _all_threads() -> Any:
    from torch._C._profiler import _ExperimentalConfig

    return _ExperimentalConfig(profile_all_threads=True)
