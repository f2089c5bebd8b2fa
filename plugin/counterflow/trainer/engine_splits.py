"""Transformer Engine's modules in split backward passes, where no module was made for them.

Its linears can delay their weight gradients: their backward puts operands and a function into a queue of the module. `Queue`
stands in the queue's place and leaves them to the W. In a B, and outside a schedule, the backward is Transformer Engine's own. A
module that was made with ``delay_wgrad_compute``, as Megatron makes them, keeps its queue.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import ref

import torch

from counterflow.runtime.weight_grads import is_holding
from counterflow.trainer.splits import add_gradient, leave, may_wait

# How weights are named by a kind of module; linears know their own names.
LINEARS, GROUPED, MLP = ("Linear", "LayerNormLinear"), "GroupedLinear", "LayerNormMLP"


class Queue:
    """Takes the place of the queue of one of Transformer Engine's modules (``wgrad_store``)."""

    context = None

    def __init__(self, module: Any, weights: list[str]) -> None:
        self._module, self._weights = ref(module), weights

    def delay_wgrad_compute(self) -> bool:
        """Tell whether weight gradients wait. A forward is told so; its backward asks again, and only in an I they do."""
        module = self._module()
        is_backward = torch._C._current_graph_task_id() != -1
        return (is_holding() or not is_backward) and all(may_wait(getattr(module, name)) for name in self._weights)

    def put(self, operands: list[Any], compute: Callable[..., Any]) -> None:
        """Leave ``compute(*operands)`` to the W."""
        module: Any = self._module()
        weights = [getattr(module, name) for name in self._weights]
        if isinstance(operands[-1], list):
            # A grouped linear returns these buffers as gradients, though they are filled in the W only.
            buffers = list(operands[-1])
            operands[-1][:] = [None] * len(buffers)
            leave(weights, partial(_add_grouped, module, [*operands[:-1], buffers], compute))
            return
        # A layer of two linears has a function for each, named after its weight.
        names = [name for name in self._weights if compute.__name__.startswith(name.removesuffix("weight"))] or self._weights
        leave([getattr(module, name) for name in names], partial(_add, module, names, operands, compute))


def split_engine_modules(model: torch.nn.Module) -> None:
    """Let the modules of Transformer Engine in a model leave weight gradients to a W; call it once their weights are noted.

    Gradients are computed in the I of a `LayerNormMLP` with biases, whose queue mixes theirs in, of one grouped weight, and of
    linears whose gradients are added to a buffer of their own, or are reduced beside the product.
    """
    engine = sys.modules.get("transformer_engine.pytorch")
    modules: Iterable[Any] = model.modules() if engine is not None else ()
    for module in modules:
        names: list[str] = _list_weights(engine, module)
        store = getattr(module, "wgrad_store", None)
        is_taken = getattr(module, "fuse_wgrad_accumulation", False) or getattr(module, "ub_bulk_wgrad", False)
        if names and store is not None and not is_taken and not store.delay_wgrad_compute():
            module.wgrad_store = Queue(module, names)


def _list_weights(engine: Any, module: Any) -> list[str]:
    """Return the names of the weights whose gradients a module of Transformer Engine can delay."""
    kinds: Any = tuple(getattr(engine, name) for name in LINEARS)
    if isinstance(module, kinds):
        return list(module.weight_names)
    if isinstance(module, getattr(engine, GROUPED)) and not getattr(module, "single_grouped_weight", False):
        return [f"weight{number}" for number in range(module.num_gemms)]
    return ["fc1_weight", "fc2_weight"] if isinstance(module, getattr(engine, MLP)) and not module.use_bias else []


def _add(module: Any, names: list[str], operands: list[Any], compute: Callable[..., Any]) -> None:
    """Compute the gradients of weights that are rows of one product, and of their biases where the product gives them too."""
    gradient, bias_gradient, *_ = compute(*operands)
    _add_rows([getattr(module, name) for name in names], gradient)
    if module.use_bias and bias_gradient is not None and bias_gradient.numel():
        _add_rows([getattr(module, name) for name in module.bias_names], bias_gradient)


def _add_rows(parameters: list[Any], gradient: Any) -> None:
    for parameter, rows in zip(parameters, gradient.split([len(one) for one in parameters]), strict=True):
        add_gradient(parameter, rows.to(parameter.dtype))


def _add_grouped(module: Any, operands: list[Any], compute: Callable[..., Any]) -> None:
    _, bias_gradients, *_ = compute(*operands)
    for number, gradient in enumerate(operands[-1]):
        weight = getattr(module, f"weight{number}")
        add_gradient(weight, gradient.to(weight.dtype))
        if module.use_bias and (found := bias_gradients[number]) is not None and found.numel():
            add_gradient(bias := getattr(module, f"bias{number}"), found.to(bias.dtype))
