"""Gradients in ``main_grad``, where Megatron keeps them: a part of a data-parallel bucket's buffer."""

from typing import Any

import torch


class MegatronGradients:
    """The `counterflow.moe.gradients.GradientStore` of Megatron's data parallelism."""

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
            parameter.register_post_accumulate_grad_hook(_add_gradient)

    def clear(self, parameter: Any) -> None:
        """Zero ``main_grad``, as ``zero_grad_buffer`` does for the model's own parameters."""
        if (own := self.of(parameter)) is not None:
            own.zero_()
            parameter.grad_added_to_main_grad = False


GRADIENTS = MegatronGradients()


def _add_gradient(parameter: Any) -> None:
    # Same as Megatron's hook for the model's parameters: a linear may have added its gradient itself and left a placeholder.
    if parameter.grad is not None and not parameter.grad_added_to_main_grad:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
