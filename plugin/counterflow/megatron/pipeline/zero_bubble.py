"""Split backward passes: an I computes input gradients, its W the weight gradients of Megatron's linears.

Local linears (attention, MLP, experts, the output layer) share one autograd function upstream. It can leave its weight gradient
undone already, for the deferred embedding gradients, so the split function asks it for that and hands the matmul to
`defer_weight_grad`. Transformer Engine's modules keep their own queues (``delay_wgrad_compute``, ``backward_dw``): one
entry per use in a backward (untested on GPU). What else has weights, norms, biases, routers, embeddings, is
computed in the I; it is small.

A weight may be used more than once, by several linears or beside them. What a linear defers goes to the gradient buffer by
itself, what other uses give goes through autograd, and Megatron's data parallelism is told for each backward which it was.
"""

from collections.abc import Iterator
from functools import partial, wraps
from importlib import metadata
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from packaging.version import Version
from torch.utils.hooks import unserializable_hook

from counterflow.errors import ScheduleError
from counterflow.megatron.gradients import GRADIENTS
from counterflow.patching import Patches
from counterflow.runtime.weight_grads import defer_weight_grad, is_holding

# From here on its delayed weight gradients know Megatron's overlapped reductions.
FIRST_ENGINE = Version("2.8.0")


def split_local_linears(patches: Patches) -> None:
    """Let Megatron's local linears leave their weight gradients to `defer_weight_grad`."""
    from megatron.core.tensor_parallel import layers

    patches.replace(layers, "LinearWithGradAccumulationAndAsyncCommunication", _make_split_linear)


def _make_split_linear(upstream: Any) -> Any:
    class SplitLinear(upstream):  # type: ignore[misc]
        """Upstream's linear; in an I its backward hands the weight gradient over."""

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
            saved_input, weight = ctx.saved_tensors
            # Without a gradient buffer (no DDP) or a weight to train, or with embedding gradients deferred already, upstream
            # goes on alone.
            is_kept = GRADIENTS.of(weight) is not None and ctx.needs_input_grad[1] and getattr(ctx, "gtp_remat_size", 1) <= 1
            is_fused = ctx.gradient_accumulation_fusion
            # So it does in a B: autograd adds all uses of a weight up. Fused, upstream would lose every use but this one.
            if not is_kept or ctx.grad_output_buffer is not None or not (is_fused or is_holding()):
                return upstream.backward(ctx, grad_output)
            # Upstream then collects the output gradient, in the type that it computes in, and leaves the weight's undone.
            ctx.gradient_accumulation_fusion, ctx.main_grad = True, weight.main_grad
            ctx.grad_output_buffer, ctx.wgrad_deferral_limit = [], 0
            # The bias's it would sum up in two steps then, and round twice.
            has_bias, ctx.use_bias = ctx.use_bias, False
            input_gradient, _, _, *others = upstream.backward(ctx, grad_output)
            collected = ctx.grad_output_buffer.pop()
            bias_gradient = collected.reshape(-1, collected.shape[-1]).sum(dim=0) if has_bias else None
            gathered_by = ctx.tp_group if ctx.sequence_parallel else None
            split = getattr(weight, "cf_split", None) or _SplitWeight(weight)
            split.leave(weight, _Use(collected, saved_input, gathered_by), is_fused)
            return input_gradient, split.placeholder, bias_gradient, *others

    return SplitLinear


class _Use(NamedTuple):
    """One use of a weight: ``grad_output`` [s, b, out], ``saved_input`` [s, b, in] or [tokens, …].

    With sequence parallelism the input was saved in shards, which the group ``gathered_by`` gathers again.
    """

    grad_output: torch.Tensor
    saved_input: torch.Tensor
    gathered_by: Any


class _SplitWeight:
    """A weight, ``cf_split`` on it, some of whose gradients go to ``main_grad`` past autograd, and others through it."""

    def __init__(self, weight: Any) -> None:
        # A zero, expanded: what autograd gets for a use whose gradient is computed later. It adds it to what other uses give.
        self.placeholder = torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)
        self._find_weight = ref(weight)
        self._backward = -1
        self._uses: list[_Use] = []
        weight.cf_split = self
        weight.register_hook(self._note)

    def leave(self, weight: Any, use: _Use, is_fused: bool) -> None:
        """Defer the gradient of one use of the weight, together with other uses in the same backward that are still deferred."""
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
    """Add grad_output^T x input of all uses to ``weight.main_grad``, their sum rounded as autograd would; empties ``uses``."""
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
    if getattr(args, "use_transformer_engine_op_fuser", False):
        # Megatron keeps the fused operations, which would queue them, where no walk over modules finds them.
        return "--use-transformer-engine-op-fuser, whose fused experts keep theirs to themselves: drop it"
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
    # Megatron refuses the option without its own overlap, so it is set after Megatron's check has run.
    def delay(self: Any) -> None:
        if post_init is not None:
            post_init(self)
        self.delay_wgrad_compute = True

    return wraps(post_init)(delay) if post_init is not None else delay


# For each Transformer Engine module, the number of queued entries that are deferred and have not run yet.
_handed_over: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def defer_engine_weight_grads(chunk: Any) -> None:
    """After a backward of a chunk: hand over what it has queued in its Transformer Engine modules, an entry for each use."""
    delayed = [module for module in _find_engine_modules(chunk) if module.wgrad_store.delay_wgrad_compute()]
    counts = {module: module.wgrad_store.context.qsize() - _handed_over.get(module, 0) for module in delayed}
    counts = {module: count for module, count in counts.items() if count > 0}
    for module, count in counts.items():
        _handed_over[module] = _handed_over.get(module, 0) + count
    if counts:
        defer_weight_grad(partial(_run_engine_weight_grads, counts))


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


def _run_engine_weight_grads(counts: dict[Any, int]) -> None:
    for module, count in counts.items():
        # Entries run in the order of the queue: the first of a step may overwrite the gradient, later ones add to it.
        for _ in range(count):
            module.backward_dw()
        _handed_over[module] -= count
