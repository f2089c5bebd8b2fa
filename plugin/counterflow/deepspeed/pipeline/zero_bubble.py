"""Split backward passes: an I computes input gradients, its W the weight gradients of linears.

The linear of torch itself is replaced, so no module of the user changes. The gradients of biases, norms and whatever else a layer
has are computed in the I; they are small. A weight's gradient that comes in a W goes the way that autograd's would have gone: to
``.grad``, and from there where the optimizer collects gradients.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any
from weakref import ref

import torch

from counterflow.deepspeed.state import Place, place_of
from counterflow.runtime.weight_grads import defer_weight_grad, is_holding


def split_linear(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.nn.functional.linear``: the weight gradient of an engine's parameter can wait for a W."""

    @wraps(linear)
    def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if _can_split(input, weight):
            return SplitLinear.apply(linear, input, weight, bias)  # type: ignore[no-any-return]
        return linear(input, weight, bias)

    return run


def _can_split(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and type(weight) is torch.nn.Parameter
        and type(input) is torch.Tensor
        and weight.requires_grad
        # Hooks of a user want every gradient, autocast has its own types, and a compiler its own functions.
        and not weight._backward_hooks
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.compiler.is_compiling()
        and weight in place_of
    )


class SplitLinear(torch.autograd.Function):
    """A linear that passes its weight gradient to `defer_weight_grad` in an I."""

    @staticmethod
    def forward(ctx: Any, linear: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``linear(input, weight, bias)``; input [..., in], weight [out, in]."""
        ctx.save_for_backward(input)
        # Not saved as the input is: where a checkpoint recomputes the layer, what comes back is another tensor object.
        ctx.weight = weight
        result: torch.Tensor = linear(input, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return the gradients of input, weight and bias; of the weight None where it waits."""
        (gradient,), (input,), weight = gradients, ctx.saved_tensors, ctx.weight
        _, needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        input_gradient = gradient.matmul(weight) if needs_input else None
        bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs_bias else None
        weight_gradient = None
        if needs_weight and is_holding():
            defer_weight_grad(partial(_add_linear, weight, gradient, input))
        elif needs_weight:
            weight_gradient = multiply(gradient, input)
        return None, input_gradient, weight_gradient, bias_gradient


def multiply(gradient: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """Return the weight gradient of a linear: gradient^T x input over all rows."""
    return gradient.reshape(-1, gradient.shape[-1]).t().mm(input.reshape(-1, input.shape[-1]))


@torch.no_grad()
def _add_linear(weight: torch.Tensor, gradient: torch.Tensor, input: torch.Tensor) -> None:
    add_gradient(weight, multiply(gradient, input))


def add_gradient(weight: Any, gradient: torch.Tensor) -> None:
    """Add a gradient that a W computed, as the hooks of the optimizer do after autograd has added one."""
    place: Place = place_of[weight]
    optimizer: Any = place.optimizer()
    if hasattr(optimizer, "_update_hp_grad"):
        # BF16_Optimizer adds what lies in .grad to a sum of its own after each backward; this one comes later.
        kept, weight.grad = weight.grad, gradient
        optimizer._update_hp_grad(weight, place.group, place.number, False)
        weight.grad = kept
        return
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    if hasattr(optimizer, "process_gradients"):
        optimizer.process_gradients(weight, place.group)


def note_weights(optimizer: Any) -> None:
    """Note of each weight of an engine's optimizer where its gradients go; the weights of others are not split."""
    for name in ("bf16_groups", "bit16_groups", "fp16_groups"):
        if (groups := getattr(optimizer, name, None)) is not None:
            break
    else:
        groups = [group["params"] for group in getattr(optimizer, "param_groups", [])]
    for number, group in enumerate(groups):
        for place, weight in enumerate(group):
            place_of[weight] = Place(ref(optimizer), number, place)
