"""Split backward passes: an I computes input gradients, its W the weight gradients of Megatron's linears.

Local linears (attention, MLP, experts, the output layer) share one autograd function upstream. For deferred embedding gradients,
that function can already omit its weight gradient. The split function switches this on and passes the matmul to
`defer_weight_grad`. Transformer Engine's modules have queues of their own (``delay_wgrad_compute``, ``backward_dw``), with one
entry for each use in a backward. The gradients of norms, biases, routers and embeddings are computed in the I;
they are small.

A weight may have several uses, in linears and elsewhere. Deferred gradients are added to the gradient buffer directly; those of
other uses come through autograd. After each backward, Megatron's data parallelism is told which of the two it was.
"""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from importlib import metadata
from typing import Any, NamedTuple
from weakref import ref

import torch
from packaging.version import Version
from torch.utils.hooks import unserializable_hook

from counterflow.errors import ScheduleError
from counterflow.megatron.gradients import GRADIENTS, defer_queued, is_delayed
from counterflow.megatron.state import layer_slots, of_chunk, of_weight
from counterflow.runtime.weight_grads import defer_weight_grad, is_holding

# The first version whose delayed weight gradients work with Megatron's overlapped reductions.
FIRST_ENGINE = Version("2.8.0")


def make_split_linear(upstream: Any) -> Any:
    """Return a subclass of Megatron's local linear, ``upstream``, that passes its weight gradient to `defer_weight_grad`."""

    class SplitLinear(upstream):  # type: ignore[misc]
        """Upstream's linear; in an I its backward defers the weight gradient."""

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
            saved_input, weight = ctx.saved_tensors
            # Upstream runs alone without a gradient buffer (no DDP), for a frozen weight, and if it defers this weight's
            # gradient itself (deferred embedding gradients).
            is_kept = GRADIENTS.of(weight) is not None and ctx.needs_input_grad[1] and getattr(ctx, "gtp_remat_size", 1) <= 1
            is_fused = ctx.gradient_accumulation_fusion
            # It does so in a B too, where autograd sums all uses of a weight; but not if fused, since it would lose other uses.
            if not is_kept or ctx.grad_output_buffer is not None or not (is_fused or is_holding()):
                return upstream.backward(ctx, grad_output)
            # With these set, upstream keeps the output gradient, in its compute type, and omits the weight gradient.
            ctx.gradient_accumulation_fusion, ctx.main_grad = True, weight.main_grad
            ctx.grad_output_buffer, ctx.wgrad_deferral_limit = [], 0
            # Upstream would then sum the bias gradient in two steps and round twice, so it is computed here.
            has_bias, ctx.use_bias = ctx.use_bias, False
            input_gradient, _, _, *others = upstream.backward(ctx, grad_output)
            collected = ctx.grad_output_buffer.pop()
            bias_gradient = collected.reshape(-1, collected.shape[-1]).sum(dim=0) if has_bias else None
            gathered_by = ctx.tp_group if ctx.sequence_parallel else None
            kept = of_weight(weight)
            kept.split = kept.split or _SplitWeight(weight)
            kept.split.leave(weight, _Use(collected, saved_input, gathered_by), is_fused)
            return input_gradient, kept.split.placeholder, bias_gradient, *others

    return SplitLinear


class _Use(NamedTuple):
    """One use of a weight: ``grad_output`` [s, b, out], ``saved_input`` [s, b, in] or [tokens, …].

    With sequence parallelism the input was saved in shards, which the group ``gathered_by`` gathers again.
    """

    grad_output: torch.Tensor
    saved_input: torch.Tensor
    gathered_by: Any


class _SplitWeight:
    """A weight with deferred gradients, which are added to ``main_grad`` directly, beside those that autograd adds."""

    def __init__(self, weight: Any) -> None:
        # An expanded zero: the gradient that autograd gets for a deferred use, and adds to the gradients of other uses.
        self.placeholder = torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)
        self._find_weight = ref(weight)
        self._backward = -1
        self._uses: list[_Use] = []
        weight.register_hook(self._note)

    def leave(self, weight: Any, use: _Use, is_fused: bool) -> None:
        """Defer the gradient of one use of the weight, together with those of other uses in the same backward."""
        # Autograd's number of the running backward. Autograd adds up a weight's gradients within one backward.
        backward = torch._C._current_graph_task_id()
        if backward == self._backward and self._uses:
            self._uses.append(use)
            return
        self._backward, self._uses = backward, [use]
        defer_weight_grad(partial(add_weight_grads, weight, self._uses, is_fused))

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _note(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Inspect the gradient that a backward returns for the weight; Megatron adds it unless it is marked as added already."""
        weight: Any = self._find_weight()
        weight.grad_added_to_main_grad = gradient is self.placeholder
        if gradient is not self.placeholder or getattr(weight, "zero_out_wgrad", False):
            return None
        # Nobody reads the values, so they are not set to zero, as in Megatron.
        return torch.empty_like(weight)


@torch.no_grad()
def add_weight_grads(weight: Any, uses: list[_Use], is_fused: bool) -> None:
    """Add the sum of grad_output^T x input over all uses to ``weight.main_grad``, rounded as by autograd; empty ``uses``."""
    from megatron.core.tensor_parallel import layers
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    require_before_reduction(weight)
    total = None
    for grad_output, saved_input, gathered_by in uses:
        if gathered_by is not None:
            saved_input = gather_from_sequence_parallel_region(saved_input, group=gathered_by)
        grad_output, total_input = layers.prepare_input_tensors_for_wgrad_compute(grad_output, saved_input)
        if is_fused:  # untested on GPU
            kernels = layers.fused_weight_gradient_mlp_cuda
            add = kernels.wgrad_gemm_accum_fp32 if weight.main_grad.dtype == torch.float32 else kernels.wgrad_gemm_accum_fp16
            add(total_input, grad_output, weight.main_grad)
        else:
            product = grad_output.t().matmul(total_input)
            total = product if total is None else total.add_(product)
    if total is not None:
        GRADIENTS.add(weight, total)
    uses.clear()


def watch_reductions(chunks: list[Any]) -> None:
    """Store for each weight the bucket group in which its gradient is reduced, for `require_before_reduction`."""
    for chunk in chunks:
        for parameter, group in getattr(chunk, "param_to_bucket_group", {}).items():
            of_weight(parameter).bucket_group = ref(group)


def require_before_reduction(weight: Any) -> None:
    """Raise `ScheduleError` if the reduction of the weight's bucket has begun."""
    bucket_group = of_weight(weight).bucket_group
    group = bucket_group() if bucket_group is not None else None
    if group is not None and group.grad_reduce_handle is not None:
        raise ScheduleError(
            f"a weight gradient of shape {tuple(weight.shape)} came after the data-parallel reduction of its bucket began: "
            "it would be lost on the other ranks"
        )


def find_engine_obstacle(args: Any) -> str | None:
    """Return why Transformer Engine cannot delay weight gradients under these arguments; None if it can."""
    if getattr(args, "tp_comm_overlap", False) and getattr(args, "tp_comm_bulk_wgrad", True):
        return "--tp-comm-overlap with its bulk weight gradients: turn tp_comm_bulk_wgrad off"
    if find_engine() is None:
        return "no transformer-engine package is installed"
    return find_old_engine()


def find_engine() -> str | None:
    """Return the installed version of Transformer Engine, None if there is none."""
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None


def find_old_engine() -> str | None:
    """Return why the installed Transformer Engine is too old to delay weight gradients; None if it is not, or is not there."""
    version = find_engine()
    if version is None or Version(version) >= FIRST_ENGINE:
        return None
    return f"transformer-engine {version}: it needs {FIRST_ENGINE} or later"


def delay_after(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a config's ``__post_init__``: Transformer Engine's modules, or DDP, are configured to delay weight gradients."""

    # Megatron refuses the option without its own overlap, so it is set after Megatron's check.
    @wraps(post_init)
    def delay(self: Any) -> None:
        post_init(self)
        self.delay_wgrad_compute = True

    return delay


def accept_missing(make_hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the maker of data parallelism's gradient hooks: at a W, a parameter of Transformer Engine may have no ``.grad``.

    Each I leaves a placeholder there, or a bias's gradient, on top of what is there; the first W's hook takes all of it. Where
    two I came before two W, the second hook finds nothing, which upstream refuses under overlapped reductions.
    """

    @wraps(make_hook)
    def make(parallel: Any, parameter: Any) -> Callable[..., None]:
        hook: Callable[..., None] = make_hook(parallel, parameter)
        if not is_delayed(parameter):
            return hook

        def run(*unused: Any) -> None:
            if parameter.grad is None:
                parameter.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            hook(*unused)

        return run

    return make


def defer_engine_weight_grads(chunk: Any) -> None:
    """Defer the weight gradients that a chunk's backward has queued in Transformer Engine modules."""
    kept = of_chunk(chunk)
    if kept.engine_modules is None:
        # Found once, as the search visits all modules of the chunk.
        kept.engine_modules = [one for one in _list_modules(chunk) if getattr(one, "wgrad_store", None) is not None]
    defer_queued(kept.engine_modules)


def _list_modules(chunk: Any) -> Iterator[Any]:
    """Yield the chunk's modules and the modules of its clones (--cf-eplb), which are not its children."""
    for module in chunk.modules():
        yield module
        if (slots := layer_slots.get(module)) is not None and slots.clone_module is not None:
            yield from slots.clone_module.modules()
