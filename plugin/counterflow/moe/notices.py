"""Points of a backward: a function is called when the gradients of some tensors have come."""

from collections.abc import Callable
from typing import Any

import torch

# Makes what is noticed require gradients, whatever its tensors do.
_ANCHOR = torch.zeros((), requires_grad=True)


def notice(call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tensors; ``call`` is called in a backward when their gradients have come, before those of what they were made of."""
    return _Notice.apply(call, _ANCHOR, *tensors) if torch.is_grad_enabled() else tensors


class _Notice(torch.autograd.Function):
    """Hands tensors on, and calls a function when their gradients have come."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hand the tensors on."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Call the function."""
        ctx.call()
        return None, None, *grads
