"""Gradients in ``main_grad``, where Megatron keeps them: a part of a data-parallel bucket's buffer."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from counterflow.megatron.state import handed_over
from counterflow.moe.gradients import Defer
from counterflow.runtime.weight_grads import defer_weight_grad


class MegatronGradients:
    """The `counterflow.moe.gradients.GradientStore` of Megatron's data parallelism."""

    is_on_parameters = True

    def of(self, parameter: Any) -> torch.Tensor | None:
        """Return ``main_grad``; None for a frozen parameter and for one outside data parallelism."""
        return getattr(parameter, "main_grad", None)

    def add(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Add to ``main_grad``, in its type."""
        parameter.main_grad.add_(gradient)

    def prepare(self, parameter: Any, like: Any) -> None:
        """Give ``parameter`` a ``main_grad`` outside all buckets, to which its backward passes add."""
        if (own := self.of(like)) is not None:
            parameter.main_grad = torch.zeros_like(own)
            parameter.grad_added_to_main_grad = False
            if not is_delayed(parameter):
                parameter.register_post_accumulate_grad_hook(_add_gradient)

    def clear(self, parameter: Any) -> None:
        """Zero ``main_grad``, as ``zero_grad_buffer`` does for the model's own parameters."""
        if (own := self.of(parameter)) is not None:
            own.zero_()
            parameter.grad_added_to_main_grad = False

    def share(self, parameter: Any, like: Any, other: Any, defer: Defer) -> None:
        """Give ``parameter`` the ``main_grad`` of ``other``, or one of its own."""
        if (own := self.of(like)) is not None:
            parameter.main_grad = torch.zeros_like(own) if other is None else other.main_grad
            parameter.grad_added_to_main_grad = False
            if not is_delayed(parameter):
                parameter.register_post_accumulate_grad_hook(partial(_leave_gradient, defer))

    def release(self, parameter: Any) -> None:
        """Do nothing: ``main_grad`` stays where it is."""


GRADIENTS = MegatronGradients()


def add_behind_delayed(module: Any) -> None:
    """Let parameters that Megatron's data parallelism does not know get the gradients that ``module`` computes at its W.

    Transformer Engine marks the parameters of a module that delays them. What its I returns for such a parameter is not filled
    yet, and its W assigns ``.grad``; then it calls what is registered here.
    """
    for part in module.modules():
        if hasattr(part, "register_wgrad_accumulation_and_reduce_hooks"):
            for parameter in filter(is_delayed, part.parameters(recurse=False)):
                part.register_wgrad_accumulation_and_reduce_hooks(partial(_add_gradient, parameter))


def is_delayed(parameter: Any) -> bool:
    """Tell whether Transformer Engine computes the parameter's gradient at its module's W."""
    return bool(getattr(parameter, "skip_backward_post_hook", False))


def defer_queued(modules: Iterable[Any]) -> None:
    """Defer the weight gradients that backwards have queued in Transformer Engine's modules, one entry for each use."""
    delayed = [module for module in modules if module.wgrad_store.delay_wgrad_compute()]
    counts = {module: module.wgrad_store.context.qsize() - handed_over.get(module, 0) for module in delayed}
    counts = {module: count for module, count in counts.items() if count > 0}
    for module, count in counts.items():
        handed_over[module] = handed_over.get(module, 0) + count
    if counts:
        defer_weight_grad(partial(_compute_queued, counts))


def _compute_queued(counts: dict[Any, int]) -> None:
    for module, count in counts.items():
        # In the order of the queue: the first entry of a step may overwrite the gradient, later entries add to it.
        for _ in range(count):
            module.backward_dw()
        handed_over[module] -= count


def _leave_gradient(defer: Defer, parameter: Any) -> None:
    if parameter.grad is not None and not parameter.grad_added_to_main_grad:
        defer(partial(GRADIENTS.add, parameter, parameter.grad))
    parameter.grad = None


def _add_gradient(parameter: Any) -> None:
    # Same as Megatron's hook for the model's parameters: a linear may have added its gradient itself and left a placeholder.
    if parameter.grad is not None and not parameter.grad_added_to_main_grad:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
