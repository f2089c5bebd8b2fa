"""Matrix products of Transformer Engine's linears, on plain and on FP8 operands, summed in FP32."""

from typing import Any

import torch
from torch.nn import functional

from counterflow.platform.engine.activations import differentiate
from counterflow.platform.engine.casts import quantize, read_matrix
from counterflow.platform.engine.names import find_type

Tensor = torch.Tensor


def _read(tensor: Any, is_transposed: bool) -> Tensor:
    return read_matrix(tensor, "columnwise" if is_transposed else "rowwise").float()


def _size(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else tuple(tensor.size())


def _multiply(a: Any, transposes_a: bool, b: Any, transposes_b: bool) -> Tensor:
    """Return ``op(b) @ op(a)``: the library is column-major, so its operands stand the other way round."""
    left, right = _read(b, transposes_b), _read(a, not transposes_a)
    return (left.t() if transposes_b else left) @ (right.t() if transposes_a else right)


def generic_gemm(
    a: Any,
    transposes_a: bool,
    b: Any,
    transposes_b: bool,
    out: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Any,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """Return ``[op(b) @ op(a), gradient of the bias, input of gelu, extra_output]``; the first is put into, or added to, ``out``.

    ``grad`` says that ``b`` is an output's gradient: then a bias gets its gradient in place of being added.
    """
    if comm_overlap is not None:
        raise NotImplementedError("transformer_engine_torch.generic_gemm with user buffers has no stand-in on the CPU")
    result = _multiply(a, transposes_a, b, transposes_b) * alpha
    kind = find_type(output_dtype) if output_dtype is not None else (a.dtype if isinstance(a, Tensor) else a._dtype)
    bias_gradient = before_gelu = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = _read(b, transposes_b).sum(0).to(kind)
        else:
            result = result + bias.float()
    if gelu and grad:
        result = differentiate("gelu", result, gelu_in.float().reshape(result.shape))
        bias_gradient = None if bias_gradient is None else result.sum(0).to(kind)
    elif gelu:
        before_gelu, result = result.to(kind), functional.gelu(result, approximate="tanh")
    if not transposes_b:
        result = result.view(*_size(b)[:-1], result.shape[-1])
        before_gelu = None if before_gelu is None else before_gelu.view(result.shape)
    return [_store(result, kind, out, quantizer, accumulate, beta), bias_gradient, before_gelu, extra_output]


def _store(result: Tensor, kind: torch.dtype, out: Any, quantizer: Any, accumulate: bool, beta: float | None) -> Any:
    if quantizer is not None:
        return quantize(result.to(kind), quantizer, out)
    if out is None:
        return result.to(kind)
    if accumulate:
        result = out.float() * (1.0 if beta is None else beta) + result.view(out.shape)
    return out.copy_(result.view(out.shape))


def te_general_grouped_gemm(
    a: list[Any],
    transposes_a: bool,
    b: list[Any],
    transposes_b: bool,
    out: list[Tensor],
    out_dtype: Any,
    splits: Any,
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    gelu_out: list[Tensor],
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    processors: int,
) -> list[Tensor]:
    """Multiply each pair of ``a`` and ``b`` into its place of ``out``; with ``grad``, put gradients of biases into ``bias``."""
    if any(one.numel() for one in gelu_out):
        raise NotImplementedError("transformer_engine_torch.te_general_grouped_gemm with gelu has no stand-in on the CPU")
    outs = torch.split(out[0], [_size(one)[0] for one in b]) if single_output else out
    for own_a, own_b, own_out, own_bias in zip(a, b, outs, bias, strict=True):
        if 0 in _size(own_a) or 0 in _size(own_b):
            if not accumulate:
                own_out.zero_()
            if grad and own_bias.numel():
                own_bias.zero_()
            continue
        result = _multiply(own_a, transposes_a, own_b, transposes_b)
        if own_bias.numel() and grad:
            own_bias.copy_(_read(own_b, transposes_b).sum(0))
        elif own_bias.numel():
            result = result + own_bias.float()
        result = result.view(own_out.shape)
        own_out.copy_(own_out.float() + result if accumulate else result)
    return bias
