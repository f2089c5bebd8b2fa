"""Split backward passes: an I computes input gradients, its W the weight gradients of Megatron's linears.

Local linears (attention, MLP, experts, the output layer) share one autograd function upstream. It can leave its weight gradient
undone already, for the deferred embedding gradients, so the split function asks it for that and hands the matmul to
`defer_weight_grad`. Transformer Engine's modules keep their own queues (``delay_wgrad_compute``, ``backward_dw``): one
entry per backward and module (untested on GPU). What else has weights, norms, biases, routers, embeddings, is
computed in the I; it is small.
"""

from collections.abc import Iterator
from functools import partial, wraps
from importlib import metadata
from typing import Any
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version

from counterflow.errors import ScheduleError
from counterflow.patching import Patches
from counterflow.runtime.weight_grads import defer_weight_grad

# From here on its delayed weight gradients know Megatron's overlapped reductions.
FIRST_ENGINE = Version("2.8.0")


def split_local_linears(patches: Patches) -> None:
    """Let Megatron's local linears leave their weight gradients to `defer_weight_grad`."""
    from megatron.core.tensor_parallel import layers

    patches.replace(layers, "LinearWithGradAccumulationAndAsyncCommunication", _make_split_linear)


def _make_split_linear(upstream: Any) -> Any:
    class SplitLinear(upstream):  # type: ignore[misc]
        """Upstream's linear; its backward hands over the weight gradient."""

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
            saved_input, weight = ctx.saved_tensors
            # Without a gradient buffer (no DDP), or with embedding gradients deferred already, upstream goes on alone.
            if not hasattr(weight, "main_grad") or ctx.grad_output_buffer is not None or getattr(ctx, "gtp_remat_size", 1) > 1:
                return upstream.backward(ctx, grad_output)
            is_fused = ctx.gradient_accumulation_fusion
            # Upstream then collects the output gradient in the buffer and returns a placeholder for the weight's.
            ctx.gradient_accumulation_fusion, ctx.main_grad = True, weight.main_grad
            ctx.grad_output_buffer, ctx.wgrad_deferral_limit = [], 0
            gradients = upstream.backward(ctx, grad_output)
            gathered_by = ctx.tp_group if ctx.sequence_parallel else None
            defer_weight_grad(partial(add_weight_grad, weight, grad_output, saved_input, gathered_by, is_fused))
            return gradients

    return SplitLinear


@torch.no_grad()
def add_weight_grad(weight: Any, grad_output: torch.Tensor, saved_input: torch.Tensor, gathered_by: Any, is_fused: bool) -> None:
    """Add grad_output^T x input to ``weight.main_grad``; ``grad_output`` [s, b, out], ``saved_input`` [s, b, in] or [tokens, …].

    With sequence parallelism the input was saved in shards, which the group ``gathered_by`` gathers again.
    """
    from megatron.core.tensor_parallel import layers
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    require_before_reduction(weight)
    if gathered_by is not None:
        saved_input = gather_from_sequence_parallel_region(saved_input, group=gathered_by)
    grad_output, total_input = layers.prepare_input_tensors_for_wgrad_compute(grad_output, saved_input)
    if is_fused:  # untested on GPU
        kernels = layers.fused_weight_gradient_mlp_cuda
        add = kernels.wgrad_gemm_accum_fp32 if weight.main_grad.dtype == torch.float32 else kernels.wgrad_gemm_accum_fp16
        add(total_input, grad_output, weight.main_grad)
    else:
        weight.main_grad.add_(grad_output.t().matmul(total_input))


def watch_reductions(chunks: list[Any]) -> None:
    """Let each weight know the bucket group in which its gradient is reduced, for `require_before_reduction`."""
    for chunk in chunks:
        for parameter, group in getattr(chunk, "param_to_bucket_group", {}).items():
            parameter.cf_bucket_group = group


def require_before_reduction(weight: Any) -> None:
    """Raise `ScheduleError` where a weight's gradient is added after the reduction of its bucket has begun."""
    group = getattr(weight, "cf_bucket_group", None)
    if group is not None and group.grad_reduce_handle is not None:
        raise ScheduleError(
            f"a weight gradient of shape {tuple(weight.shape)} came after the data-parallel reduction of its bucket began: "
            "it would be lost on the other ranks"
        )


def find_engine_obstacle(args: Any) -> str | None:
    """Return why Transformer Engine cannot delay weight gradients under these arguments; None where it can."""
    if getattr(args, "tp_comm_overlap", False) and getattr(args, "tp_comm_bulk_wgrad", True):
        return "--tp-comm-overlap with its bulk weight gradients: turn tp_comm_bulk_wgrad off"
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "no transformer-engine package is installed"
    if Version(version) < FIRST_ENGINE:
        return f"transformer-engine {version}: it needs {FIRST_ENGINE} or later"
    return None


def delay_engine_weight_grads(patches: Patches) -> None:
    """Let Transformer Engine's modules and Megatron's DDP delay weight gradients in every model built from here on."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    for config in (TransformerConfig, DistributedDataParallelConfig):
        patches.set(config, "__post_init__", _set_after(getattr(config, "__post_init__", None)))


def _set_after(post_init: Any) -> Any:
    # Upstream allows it with its own overlap alone, which is who else calls backward_dw: set it once that has been checked.
    def delay(self: Any) -> None:
        if post_init is not None:
            post_init(self)
        self.delay_wgrad_compute = True

    return wraps(post_init)(delay) if post_init is not None else delay


def defer_engine_weight_grads(chunk: Any) -> None:
    """After a backward of a chunk: hand the queued weight gradients of its Transformer Engine modules over."""
    modules = _find_engine_modules(chunk)
    if modules:
        defer_weight_grad(partial(_run_engine_weight_grads, modules))


_engine_modules: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def _find_engine_modules(chunk: Any) -> list[Any]:
    """Return the chunk's Transformer Engine modules; looked for once, since that is a walk over all of its modules."""
    if chunk not in _engine_modules:
        _engine_modules[chunk] = [one for one in _list_modules(chunk) if getattr(one, "wgrad_store", None) is not None]
    return _engine_modules[chunk]


def _list_modules(chunk: Any) -> Iterator[Any]:
    """Yield the chunk's modules, and those of its clones (--cf-eplb), which are no children of it."""
    for module in chunk.modules():
        yield module
        if (slots := getattr(module, "cf_slots", None)) is not None and slots.clone_module is not None:
            yield from slots.clone_module.modules()


def _run_engine_weight_grads(modules: list[Any]) -> None:
    for module in modules:
        # A module that this micro-batch did not pass has queued nothing.
        if module.wgrad_store.delay_wgrad_compute() and not module.wgrad_store.context.empty():
            module.backward_dw()
