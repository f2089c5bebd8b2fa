"""Split backward passes of models made of torch's modules: an I computes input gradients, its W the weight gradients.

Three ways, of which the first that fits is taken. The functions of torch that multiply by a weight are replaced (`split_linear`
and the others), so no module of the user changes. Transformer Engine's modules hand over what they queue
(`counterflow.trainer.engine_splits`). What is left is split in the autograd graph of the chunk
(`counterflow.runtime.graph_split`), where it is so much that this pays for the memory (`GraphSplits`).

An adapter says in `weights` where a weight's gradient goes that comes in a W.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from counterflow.runtime.graph_split import Add, Node, run_split
from counterflow.runtime.handover import find_flow
from counterflow.runtime.weight_grads import defer_weight_grad, is_holding

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
# Takes the output's gradient, input and weight, and which gradients of input, weight and bias to compute.
Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[bool, bool, bool]], Gradients]

# A chunk's graph is split if more than this share of its weights would be computed in the I.
SHARE = 0.1


class Kept(NamedTuple):
    """A weight whose gradient may wait: ``add`` takes it in the W. ``hooks`` of the trainer are told then."""

    add: Add
    hooks: int


# The weights of models that run tables; gradients of others do not wait.
weights: Any = WeakTensorKeyDictionary()


def note_weight(weight: torch.Tensor, add: Add, trainer: str) -> None:
    """Let the gradient of a weight wait, unless a user's hook wants every gradient; ``trainer`` is the package of other hooks."""
    homes = _list_hooks(weight)
    if all(home.startswith(f"{trainer}.") for home in homes):
        weights[weight] = Kept(add, len(homes))


def _list_hooks(weight: Any) -> list[str]:
    """Return the modules of what is called when the weight has got a gradient."""
    return [str(getattr(hook, "__module__", "")) for hook in (weight._post_accumulate_grad_hooks or {}).values()]


def may_wait(weight: Any) -> bool:
    """Tell whether the gradient of this tensor may come in a W."""
    kept: Kept | None = weights.get(weight)
    return kept is not None and not weight._backward_hooks and len(_list_hooks(weight)) == kept.hooks


def add_gradient(weight: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Add the gradient that a W has computed to the weight's."""
    if gradient is not None:
        with torch.no_grad():
            weights[weight].add(weight, gradient)


def leave(several: Iterable[torch.Tensor], compute: Callable[[], None]) -> None:
    """Leave ``compute``, which gives these weights their gradients, to the W."""
    if _left is not None:
        _left.update(map(id, several))
    defer_weight_grad(compute)


def split_linear(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.nn.functional.linear``: the gradient of a weight in `weights` can wait for a W."""

    @wraps(linear)
    def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if _can_split(input, weight):
            return Split.apply(linear, _pass_linear, input, weight, bias)  # type: ignore[no-any-return]
        return linear(input, weight, bias)

    return run


def split_matmul(matmul: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap ``torch.matmul`` likewise, for a weight that is transposed first, as in DeepSpeed's tensor-parallel linears."""

    @wraps(matmul)
    def run(input: torch.Tensor, other: torch.Tensor, **more: Any) -> torch.Tensor:
        weight = other._base if torch.is_tensor(other) else None
        if (
            weight is not None
            and not more
            and weight.dim() == other.dim() == 2
            and other.shape == weight.shape[::-1]
            and other.stride() == weight.stride()[::-1]
            and _can_split(input, weight)
        ):
            return Split.apply(_multiply(matmul), _pass_linear, input, weight, None)  # type: ignore[no-any-return]
        return matmul(input, other, **more)

    return run


def _multiply(matmul: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda input, weight, bias: matmul(input, weight.t())


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
        # Autocast has its own types, and a compiler its own functions.
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.compiler.is_compiling()
        and may_wait(weight)
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
            leave([ctx.weight], partial(_add, ctx.passes, gradient, input, ctx.weight))
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


def _add(passes: Backward, gradient: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> None:
    with torch.no_grad():
        add_gradient(weight, passes(gradient, input, weight, (False, True, False))[1])


class GraphSplits:
    """Which stages of a model are split in their autograd graph: those whose first I computes much of their weights otherwise.

    ``say`` is told once of each such stage. What recomputes layers in its backward stays whole: each start of autograd in a W
    would recompute them anew.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._chosen: dict[int, bool] = {}

    @contextmanager
    def run(
        self, stage: int, list_parameters: Callable[[], Iterable[Any]], inputs: Sequence[Any], hooked: Collection[Node]
    ) -> Iterator[None]:
        """Split the backward that is started in the block by torch, or by `start_backward`, if an I runs and the stage is chosen.

        The gradients of ``inputs`` are wanted. ``hooked`` are nodes whose tensors have hooks (`note_hooks`).
        """
        global _split
        flow = find_flow()
        if not is_holding() or (flow is not None and flow.other is not None):
            yield
        elif stage not in self._chosen:
            with self._measure(stage, [one for one in list_parameters() if one.dim() > 1 and may_wait(one)]):
                yield
        else:
            wanted = [one for one in inputs if one is not None and one.requires_grad]
            _split = (
                partial(run_split, inputs=wanted, may_wait=may_wait, add=add_gradient, once=hooked)
                if self._chosen[stage]
                else None
            )
            try:
                yield
            finally:
                _split = None

    @contextmanager
    def _measure(self, stage: int, matrices: list[Any]) -> Iterator[None]:
        """Choose by what the whole backward in the block leaves to its W."""
        global _left
        ran: list[bool] = []
        watch = register_module_forward_pre_hook(lambda *_: ran.append(True))
        left: set[int] = set()
        _left = left
        try:
            yield
        finally:
            _left = None
            watch.remove()
        whole = sum(one.numel() for one in matrices if id(one) not in left)
        share = whole / max(sum(one.numel() for one in matrices), 1)
        self._chosen[stage] = share > SHARE and not ran
        if self._chosen[stage]:
            self._say(
                f"counterflow: zero_bubble: {share:.0%} of the weights of stage {stage} are split in the autograd graph: what "
                "its backward needs stays in memory until its W"
            )


# The weights, by identity, whose gradients have been left to a W since it was set.
_left: set[int] | None = None
# Runs the backward that is started next, from roots and their gradients.
_split: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None] | None = None
# The nodes to which hooks have been added since it was set.
_hooked: list[Node] | None = None


def start_backward(roots: Sequence[torch.Tensor], starts: Sequence[torch.Tensor]) -> bool:
    """Run a backward split, if that is due; tell whether it has been run. One that is started inside it is whole."""
    global _split
    if _split is None:
        return False
    run, _split = _split, None
    run(roots, starts)
    return True


def split_backward(backward: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``torch.autograd.backward``: one from a single loss may be due to be split."""

    @wraps(backward)
    def run(tensors: Any, *args: Any, **kwargs: Any) -> None:
        is_plain = torch.is_tensor(tensors) and tensors.dim() == 0 and all(not one for one in (*args, *kwargs.values()))
        if not (is_plain and start_backward([tensors], [torch.ones_like(tensors)])):
            backward(tensors, *args, **kwargs)

    return run


def split_hooks(register_hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``torch.Tensor.register_hook``: note the node of the tensor, which is run once then."""

    @wraps(register_hook)
    def run(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _hooked is not None and self.grad_fn is not None:
            _hooked.append(self.grad_fn)
        return register_hook(self, *args, **kwargs)

    return run


@contextmanager
def note_hooks() -> Iterator[list[Node]]:
    """Collect the nodes of tensors that get hooks inside the block."""
    global _hooked
    before, _hooked = _hooked, []
    try:
        yield _hooked
    finally:
        _hooked = before
