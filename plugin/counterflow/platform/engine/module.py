"""Put the stand-in together: a module with every name that Transformer Engine's Python asks ``transformer_engine_torch`` for."""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, NoReturn

import torch

from counterflow.platform.engine import activations, casts, norms, optimizers, products, rows, scaling
from counterflow.platform.engine.names import BUFFERS, ENUMS, MISSING, Backend

NAME = "transformer_engine_torch"
# What the libraries of a GPU would say of themselves: new enough for all that is stood in for.
CUBLAS, CUDNN = 120900, 91200

IMPLEMENTED: tuple[Callable[..., Any], ...] = (
    *(casts.quantize, casts.dequantize, casts.fp8_transpose, casts.swap_first_dims, casts.bgrad_quantize),
    *(casts.multi_tensor_quantize, casts.split_quantize),
    *(products.generic_gemm, products.te_general_grouped_gemm),
    *(norms.layernorm_fwd, norms.layernorm_bwd, norms.rmsnorm_fwd, norms.rmsnorm_bwd, norms.rmsnorm_bwd_add),
    *(scaling.compute_amax, scaling.fused_amax_and_scale_update_after_reduction),
    *(scaling.fp8_block_scaling_compute_partial_amax, scaling.fp8_block_scaling_partial_cast),
    scaling.multi_tensor_compute_scale_and_scale_inv,
    *(optimizers.multi_tensor_scale, optimizers.multi_tensor_scale_tensor, optimizers.multi_tensor_adam),
    *(optimizers.multi_tensor_l2norm, optimizers.multi_tensor_unscale_l2norm),
    *(rows.fused_multi_row_padding, rows.fused_multi_row_unpadding),
)


class FP8TensorMeta:
    """The scales of a group of tensors; Transformer Engine sets its attributes."""

    scale = scale_inv = amax_history = None


def list_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that have a stand-in, by name."""
    made: dict[str, Callable[..., Any]] = {function.__name__: function for function in IMPLEMENTED}
    made |= {"create_empty_quantized_tensor": casts.make_empty, **activations.list_activations(), **activations.list_softmaxes()}
    return made | {
        "get_cublasLt_version": lambda: CUBLAS,
        "get_cudnn_version": lambda: CUDNN,
        "get_num_cublas_streams": lambda: 4,
        "get_stream_priority_range": lambda *_: (0, 0),
        "device_supports_multicast": lambda *_: False,
        "ubuf_built_with_mpi": lambda *_: False,
        # Attention is Transformer Engine's unfused one.
        "get_fused_attn_backend": lambda *_: (Backend(-1), "the stand-in has no fused attention"),
    }


def make_module() -> ModuleType:
    """Return the stand-in as a module."""
    module = ModuleType(NAME, __doc__)
    for name, values in ENUMS.items():
        setattr(module, name, values)
    module.FP8TensorMeta = FP8TensorMeta  # type: ignore[attr-defined]
    for name in BUFFERS:
        setattr(module, name, type(name, (), {"__init__": _refuse(name)}))
    for name in MISSING:
        setattr(module, name, _refuse(name))
    for name, function in list_functions().items():
        setattr(module, name, _count(name, function))
    module.__all__ = [name for name in vars(module) if not name.startswith("__")]  # type: ignore[attr-defined]
    return module


def _count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        casts.counts[name] += 1
        return function(*args, **kwargs)

    return run


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{NAME}.{name} has no stand-in on the CPU: drop the flag that asks for it, or run on a GPU")

    return refuse


def make_wgrad_module() -> ModuleType:
    """Return a stand-in for Apex's ``fused_weight_gradient_mlp_cuda``, by which Megatron's own linears add to ``main_grad``."""
    module = ModuleType("fused_weight_gradient_mlp_cuda", make_wgrad_module.__doc__)

    def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        outputs, inputs = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (grad_output, total_input))
        main_grad.add_((outputs.t() @ inputs).to(main_grad.dtype))

    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    return module
