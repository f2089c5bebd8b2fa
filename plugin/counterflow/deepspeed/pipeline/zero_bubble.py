"""Split backward passes: an I computes input gradients, its W the weight gradients of linears, embeddings and convolutions.

The functions of torch themselves are replaced, so no module of the user changes. The gradients of biases, norms and whatever else
a layer has are computed in the I; they are small. A weight's gradient that comes in a W goes the way that autograd's would have
gone: to ``.grad``, and from there where the optimizer collects gradients.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any
from weakref import ref

import torch

from counterflow.deepspeed.state import Place, place_of
from counterflow.runtime.weight_grads import defer_weight_grad, is_holding

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
# Takes the output's gradient, input and weight, and which gradients of input, weight and bias to compute.
Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[bool, bool, bool]], Gradients]


def split_linear(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.nn.functional.linear``: the weight gradient of an engine's parameter can wait for a W."""

    @wraps(linear)
    def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if _can_split(input, weight):
            return Split.apply(linear, _pass_linear, input, weight, bias)  # type: ignore[no-any-return]
        return linear(input, weight, bias)

    return run


def split_embedding(embedding: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.nn.functional.embedding`` likewise. What changes weights in the forward, or has sparse gradients, stays."""

    @wraps(embedding)
    def run(
        input: torch.Tensor,
        weight: torch.Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> torch.Tensor:
        if max_norm is not None or sparse or not _can_split(input, weight):
            return embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        passes = partial(_pass_embedding, padding, scale_grad_by_freq)
        return Split.apply(lambda rows, table, _: embedding(rows, table, padding_idx), passes, input, weight, None)  # type: ignore[no-any-return]

    return run


def split_convolution(dimensions: int, convolution: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.nn.functional.conv1d``, ``conv2d`` or ``conv3d`` likewise. A padding that is named stays."""

    @wraps(convolution)
    def run(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        given = stride, padding, dilation, groups
        # Without a batch, gradients have another shape.
        if isinstance(padding, str) or input.dim() != dimensions + 2 or not _can_split(input, weight):
            return convolution(input, weight, bias, *given)
        sizes = [[one] * dimensions if isinstance(one, int) else list(one) for one in given[:3]]
        passes = partial(_pass_convolution, sizes, groups)
        return Split.apply(lambda x, w, b: convolution(x, w, b, *given), passes, input, weight, bias)  # type: ignore[no-any-return]

    return run


split_conv1d, split_conv2d, split_conv3d = (partial(split_convolution, dimensions) for dimensions in (1, 2, 3))


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


class Split(torch.autograd.Function):
    """A function of an input, a weight and a bias that passes its weight gradient to `defer_weight_grad` in an I."""

    @staticmethod
    def forward(
        ctx: Any, function: Any, passes: Backward, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``function(input, weight, bias)``; ``passes`` is its backward."""
        ctx.save_for_backward(input)
        # Not saved as the input is: where a checkpoint recomputes the layer, what comes back is another tensor object.
        ctx.weight, ctx.passes = weight, passes
        result: torch.Tensor = function(input, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return the gradients of input, weight and bias; of the weight None where it waits."""
        (gradient,), (input,) = gradients, ctx.saved_tensors
        _, _, needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        waits = needs_weight and is_holding()
        if waits:
            defer_weight_grad(partial(_add, ctx.passes, gradient, input, ctx.weight))
        return None, None, *ctx.passes(gradient, input, ctx.weight, (needs_input, needs_weight and not waits, needs_bias))


def _pass_linear(gradient: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, bool, bool]) -> Gradients:
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient.matmul(weight) if wanted[0] else None,
        rows.t().mm(input.reshape(-1, input.shape[-1])) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _pass_embedding(
    padding: int,
    is_scaled: bool,
    gradient: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    if not wanted[1]:
        return None, None, None
    return None, torch.ops.aten.embedding_dense_backward(gradient, rows, weight.shape[0], padding, is_scaled), None


def _pass_convolution(
    sizes: list[list[int]],
    groups: int,
    gradient: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    shift = [0] * len(sizes[0])
    found = torch.ops.aten.convolution_backward(
        gradient, input, weight, [weight.shape[0]], *sizes, False, shift, groups, list(wanted)
    )
    # Some kernels compute the weight's gradient with that of the bias, and give it another shape.
    on_input, on_weight, on_bias = (one if is_wanted else None for one, is_wanted in zip(found, wanted, strict=True))
    return on_input, None if on_weight is None else on_weight.view_as(weight), on_bias


@torch.no_grad()
def _add(passes: Backward, gradient: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> None:
    add_gradient(weight, passes(gradient, input, weight, (False, True, False))[1])


def add_gradient(weight: Any, gradient: torch.Tensor | None) -> None:
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
