"""Layers as annotations in a profiler's trace: hooks on modules and on the tensors between them, while a step is profiled."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.profiler import record_function

from counterflow.runtime.handover import Carried
from counterflow.runtime.weight_grads import note_weight_grads
from counterflow.schedule.annotations import name_layer


@runtime_checkable
class LayeredWork(Protocol):
    """Work that knows the layers of its model chunks."""

    def list_layers(self) -> Mapping[str, nn.Module]:
        """Return this rank's layers, by what each is called in the whole model."""


def name_once(places: Iterable[tuple[str, Any]]) -> dict[str, nn.Module]:
    """Return the modules among the layers at these places, by place; those at several places are left out.

    A tied module may be two layers, and its hooks do not know of which they are called.
    """
    modules = [(place, layer) for place, layer in places if isinstance(layer, nn.Module)]
    times = Counter(id(module) for _, module in modules)
    return {place: module for place, module in modules if times[id(module)] == 1}


class LayerNotes:
    """Annotates the forward, the backward and the weight gradients of layers; of one flow one layer is open at a time.

    A layer's backward begins when its output has its gradient and ends when its input has. The hooks are on tensors: those that
    torch has for the backward of a module would put functions of their own into the graph.
    """

    def __init__(self) -> None:
        # The flow that has the rank has a layer open, or none; `carried` keeps that of the flow that waits.
        self._open: tuple[str, str, record_function] | None = None
        self._handles: list[Any] = []
        self.carried = Carried(self._suspend, self._resume, lambda: None)

    def attach(self, layers: Mapping[str, nn.Module]) -> None:
        """Note these layers from now on."""
        for layer, module in layers.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True))
            self._handles.append(module.register_forward_hook(partial(self._leave, layer)))
        note_weight_grads(self._note)

    def detach(self) -> None:
        """Take the hooks away."""
        note_weight_grads(None)
        while self._handles:
            self._handles.pop().remove()

    def close(self) -> None:
        """End what is open: a backward whose layer has no input with a gradient, as an embedding, ends with its action."""
        if self._open is not None:
            self._open[2].__exit__(None, None, None)
            self._open = None

    def _begin(self, layer: str, letter: str) -> None:
        self.close()
        self._open = layer, letter, record_function(name_layer(layer, letter))
        self._open[2].__enter__()  # type: ignore[no-untyped-call]

    def _end(self, layer: str, letter: str) -> None:
        # Where two layers meet at one tensor the backward of the one has begun before that of the other is ended.
        if self._open is not None and self._open[:2] == (layer, letter):
            self.close()

    def _enter(self, layer: str, _module: nn.Module, given: Any, named: Any) -> None:
        if (tensor := _find_tensor((given, named))) is not None:
            _hook(tensor, partial(self._end, layer, "B"))
        # What a backward computes again is part of it.
        self._begin(layer, "F" if torch._C._current_graph_task_id() == -1 else "B")

    def _leave(self, layer: str, _module: nn.Module, _given: Any, output: Any) -> None:
        self.close()
        if torch.is_grad_enabled() and (tensor := _find_tensor(output)) is not None:
            _hook(tensor, partial(self._begin, layer, "B"))

    def _note(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return weight-gradient work that is noted as that of the open layer, whose backward defers it."""
        if self._open is None:
            return compute
        layer = self._open[0]

        def run() -> None:
            before = self._suspend()
            self._begin(layer, "W")
            compute()
            self.close()
            self._resume(before)

        return run

    def _suspend(self) -> tuple[str, str] | None:
        before = self._open
        self.close()
        return before[:2] if before is not None else None

    def _resume(self, before: tuple[str, str] | None) -> None:
        self.close()
        if before is not None:
            self._begin(*before)


def _hook(tensor: torch.Tensor, act: Callable[[], None]) -> None:
    """Let something be done once a tensor has its gradient."""
    tensor.register_hook(lambda _: act())  # type: ignore[no-untyped-call]


def _find_tensor(values: Any) -> torch.Tensor | None:
    """Return the first tensor that has a gradient."""
    if isinstance(values, torch.Tensor):
        return values if values.requires_grad else None
    members = values.values() if isinstance(values, dict) else values if isinstance(values, tuple | list) else ()
    return next((found for member in members if (found := _find_tensor(member)) is not None), None)
