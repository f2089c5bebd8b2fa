"""Casts to FP8 and back: one scale for a tensor, for a block of it, or for 32 values of it.

The quantizers and the tensors are Transformer Engine's own Python objects; here their buffers are filled and read. A buffer is
kept in two directions, along rows and along columns, because the products of a GPU read along their inner dimension. On GPUs
whose products need no transposes (`keeps_transposes`), tensors of one scale have the first buffer alone.
"""

from collections import Counter
from typing import Any

import torch
from torch.nn import functional

from counterflow.platform.engine.names import find_type

LARGEST = torch.finfo(torch.float32).max
SIGN_AND_EXPONENT = -(1 << 23)
BLOCK, GROUP = 128, 32

counts: Counter[str] = Counter()
"""How often each function of the stand-in ran, by name, and ``quantized NAME`` for each class of quantizer."""

Tensor = torch.Tensor


def keeps_transposes() -> bool:
    """Tell whether the GPU that is stood for multiplies FP8 only along rows, so that tensors keep their transpose too."""
    major, _ = torch.cuda.get_device_capability()
    return not (major in (10, 11) or major >= 13)


def transpose_shape(shape: Any) -> list[int]:
    """Return the shape of the transpose of a tensor seen as a matrix: its last dimension comes first."""
    return [shape[-1], *shape[:-1]] if len(shape) else []


def transpose(tensor: Tensor) -> Tensor:
    """Return the contiguous transpose of a tensor seen as a matrix, ``[..., n]`` to ``[n, ...]``."""
    return tensor.reshape(-1, tensor.shape[-1]).t().contiguous().view(transpose_shape(tensor.shape))


def read_plain(tensor: Any) -> Tensor:
    """Return a tensor of a plain type: the tensor itself, or the values of a quantized one."""
    is_quantized = hasattr(tensor, "_quantizer") and hasattr(tensor, "dequantize")
    plain: Tensor = tensor.dequantize() if is_quantized else tensor
    return plain


def cast(values: Tensor, scale: Tensor, dtype: Any) -> Tensor:
    """Scale and cast to FP8, as bytes; what is out of range becomes the largest value, as CUDA's casts do it, not NaN."""
    kind = find_type(dtype)
    top = torch.finfo(kind).max
    return (values * scale).clamp(-top, top).to(kind).view(torch.uint8)


def find_scale(amax: Tensor, top: float, power_of_two: bool, epsilon: float) -> Tensor:
    """Return the scales that map largest magnitudes ``amax`` to ``top``, rounded down to a power of two on demand."""
    amax = torch.where(amax < epsilon, torch.full_like(amax, epsilon), amax)
    scale = top / amax
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, LARGEST), scale)
    if power_of_two:
        scale = (scale.contiguous().view(torch.int32) & SIGN_AND_EXPONENT).view(torch.float32)
    return torch.where((amax == 0) | torch.isinf(amax), torch.ones_like(scale), scale)


def make_empty(quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool = False) -> Any:
    """Return the quantizer's kind of tensor with buffers that are not filled (``create_empty_quantized_tensor``)."""
    shape, kind = tuple(int(size) for size in shape), type(quantizer).__name__
    device = torch.device("cpu")
    if kind in ("Float8Quantizer", "Float8CurrentScalingQuantizer"):
        return _make_empty_scaled(quantizer, shape, dtype, device)
    if kind not in FILL:
        raise NotImplementedError(f"transformer_engine_torch.create_empty_quantized_tensor of {kind} has no stand-in on the CPU")
    buffers = quantizer.alloc_tensors(shape, device=device)
    names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    made = quantizer.storage_metadata(dtype)
    settings = {name: buffers.get(f"_{name}") for name in names} | made["nontensor_kwargs"]
    if "with_gemm_swizzled_scales" in settings:
        # Scales stay in the order of their blocks here.
        settings["with_gemm_swizzled_scales"] = False
    if not quantizer.internal:
        settings.pop("fake_dtype")
        settings |= {"shape": shape, "dtype": dtype, "device": device}
    return made["cls"](**settings)


def _make_empty_scaled(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor, Float8TensorStorage

    has_data = quantizer.rowwise_usage or not keeps_transposes()
    has_transpose = quantizer.columnwise_usage and keeps_transposes()
    is_delayed = type(quantizer).__name__ == "Float8Quantizer"
    settings = {
        "data": torch.empty(shape, dtype=torch.uint8, device=device) if has_data else None,
        "fp8_scale_inv": torch.reciprocal(quantizer.scale) if is_delayed else torch.empty(1, device=device),
        "fp8_dtype": quantizer.dtype,
        "data_transpose": torch.empty(transpose_shape(shape), dtype=torch.uint8, device=device) if has_transpose else None,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**settings, fake_dtype=dtype)
    return Float8Tensor(shape=shape, dtype=dtype, device=device, **settings)


@torch.no_grad()
def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Fill ``output``, or a new tensor, with the quantized values of ``tensor``; do nothing if ``noop`` holds 1."""
    if noop is not None and float(noop) == 1.0:
        return output
    plain, kind = read_plain(tensor), type(quantizer).__name__
    if output is None:
        output = make_empty(quantizer, plain.shape, plain.dtype, plain.device)
    if kind not in FILL:
        raise NotImplementedError(f"transformer_engine_torch.quantize of {kind} has no stand-in on the CPU")
    counts[f"quantized {kind}"] += 1
    FILL[kind](plain, quantizer, output)
    return output


def _fill_delayed(source: Tensor, quantizer: Any, out: Any) -> None:
    """Cast by the scale that the history of largest magnitudes gave, and note this tensor's."""
    values = source.detach().float()
    if values.numel():
        quantizer.amax.copy_(torch.maximum(quantizer.amax, values.abs().amax()))
    out._scale_inv.copy_(torch.reciprocal(quantizer.scale))
    _store_scaled(values, quantizer.scale, quantizer, out)


def _fill_current(source: Tensor, quantizer: Any, out: Any) -> None:
    """Cast by a scale from the tensor's own largest magnitude."""
    values = source.detach().float()
    amax = values.abs().amax() if values.numel() else torch.zeros(())
    if quantizer.with_amax_reduction:
        amax = amax.reshape(1)
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    top = torch.finfo(find_type(quantizer.dtype)).max
    scale = find_scale(amax.reshape(()), top, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    out._scale_inv.copy_(torch.reciprocal(scale).reshape(out._scale_inv.shape))
    _store_scaled(values, scale, quantizer, out)


def _store_scaled(values: Tensor, scale: Tensor, quantizer: Any, out: Any) -> None:
    if not values.numel():
        return
    has_data = quantizer.rowwise_usage or not keeps_transposes()
    has_transpose = quantizer.columnwise_usage and keeps_transposes()
    if has_transpose and not has_data:
        raise NotImplementedError("transformer_engine_torch.quantize along columns alone, by one scale, is in no version")
    data = cast(values, scale, quantizer.dtype)
    out._data = _put(data, out._data) if has_data else None
    out._transpose = _put(transpose(data), out._transpose) if has_transpose else None
    out._transpose_invalid = not has_transpose


def _put(made: Tensor, kept: Tensor | None) -> Tensor:
    # In place: what earlier micro-batches have saved for their backward refers to the same buffer.
    return made if kept is None else kept.copy_(made.view(kept.shape))


def _cut(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return the blocks of a matrix, padded with zeros: ``[blocks of rows, rows, blocks of columns, columns]``."""
    height, width = matrix.shape
    padded = functional.pad(matrix, (0, -width % columns, 0, -height % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def _cast_blocks(blocks: Tensor, scale: Tensor, dtype: Any, like: Tensor) -> Tensor:
    """Cast blocks, each by its own scale; return them put together in the shape of the matrix ``like``."""
    bytes_of_blocks = cast(blocks, scale[:, None, :, None], dtype)
    rows, columns = blocks.shape[0] * blocks.shape[1], blocks.shape[2] * blocks.shape[3]
    return bytes_of_blocks.view(rows, columns)[: like.shape[0], : like.shape[1]]


def _fill_blocks(source: Tensor, quantizer: Any, out: Any) -> None:
    """Cast by a scale for each 1 x 128 values (activations, gradients) or 128 x 128 (weights), in both directions."""
    if not source.numel():
        return
    matrix = source.detach().float().reshape(-1, source.shape[-1])
    top = torch.finfo(find_type(quantizer.dtype)).max
    rows = BLOCK if quantizer.block_scaling_dim == 2 else 1
    for direction, seen in (("rowwise", matrix), ("columnwise", matrix.t().contiguous())):
        if getattr(quantizer, f"{direction}_usage"):
            blocks = _cut(seen, rows, BLOCK)
            scale = find_scale(blocks.abs().amax((1, 3)), top, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
            inverse = torch.reciprocal(scale)
            # Scales of rows are kept transposed.
            _store_blocks(
                out, direction, _cast_blocks(blocks, scale, quantizer.dtype, seen), inverse if rows > 1 else inverse.t()
            )


def _fill_groups(source: Tensor, quantizer: Any, out: Any) -> None:
    """Cast by a power of two for each 32 values along rows, and for each 32 along columns (MXFP8)."""
    if not source.numel():
        return
    matrix = source.detach().float().reshape(-1, source.shape[-1])
    top = torch.finfo(find_type(quantizer.dtype)).max
    for direction, rows, columns in (("rowwise", 1, GROUP), ("columnwise", GROUP, 1)):
        if getattr(quantizer, f"{direction}_usage"):
            blocks = _cut(matrix, rows, columns)
            exponents = _find_exponents(blocks.abs().amax((1, 3)) / top)
            cast_values = _cast_blocks(blocks, torch.exp2(127.0 - exponents.float()), quantizer.dtype, matrix)
            _store_blocks(out, direction, cast_values, exponents.to(torch.uint8))


def _find_exponents(factors: Tensor) -> Tensor:
    """Return the biased exponents of the smallest powers of two that are not below ``factors`` (E8M0)."""
    mantissa, exponent = torch.frexp(factors)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(mantissa == 0, torch.zeros_like(exponent), (exponent + 127).clamp(0, 254))


def _store_blocks(out: Any, direction: str, data: Tensor, scales: Tensor) -> None:
    kept_data, kept_scales = getattr(out, f"_{direction}_data"), getattr(out, f"_{direction}_scale_inv")
    kept_data.copy_(data.reshape(kept_data.shape))
    # Room for scales is padded.
    kept_scales.zero_()
    kept_scales[: scales.shape[0], : scales.shape[1]] = scales


FILL = {
    "Float8Quantizer": _fill_delayed,
    "Float8CurrentScalingQuantizer": _fill_current,
    "Float8BlockQuantizer": _fill_blocks,
    "MXFP8Quantizer": _fill_groups,
}


def read_matrix(tensor: Any, direction: str) -> Tensor:
    """Return an operand as a matrix, read from the one buffer that a GPU's product would read; raises if that is missing."""
    kind = type(tensor).__name__
    if kind.startswith("Float8Blockwise"):
        return _read_blocks(tensor, direction)
    if kind.startswith("MXFP8"):
        return read_groups(tensor, direction)
    if kind in ("Float8Tensor", "Float8TensorStorage"):
        return _read_scaled(tensor, direction)
    plain: Tensor = tensor.detach().reshape(-1, tensor.shape[-1])
    return plain


def _read_scaled(tensor: Any, direction: str) -> Tensor:
    kind = find_type(tensor._fp8_dtype)
    if direction == "rowwise" or not keeps_transposes():
        data = _require(tensor._data, direction)
        rows: Tensor = data.view(kind).float().reshape(-1, data.shape[-1]) * tensor._scale_inv
        return rows
    if tensor._transpose is None or tensor._transpose_invalid:
        raise RuntimeError("a product on FP8 operands: the transpose is missing or stale")
    flipped: Tensor = tensor._transpose.view(kind).float()
    columns: Tensor = flipped.reshape(flipped.shape[0], -1).t() * tensor._scale_inv
    return columns


def _read_blocks(tensor: Any, direction: str) -> Tensor:
    _require(getattr(tensor, f"_{direction}_data"), direction)
    # Transformer Engine's own Python reads the rows wherever there are any.
    name = f"_{'columnwise' if direction == 'rowwise' else 'rowwise'}_data"
    hidden = getattr(tensor, name)
    setattr(tensor, name, None)
    try:
        full: Any = tensor.dequantize(dtype=torch.float32)
    finally:
        setattr(tensor, name, hidden)
    matrix: Tensor = full.reshape(-1, full.shape[-1])
    return matrix


def read_groups(tensor: Any, direction: str) -> Tensor:
    """Return the values of an MXFP8 tensor as a matrix."""
    data = _require(getattr(tensor, f"_{direction}_data"), direction)
    values = data.view(find_type(tensor._fp8_dtype)).float().reshape(-1, data.shape[-1])
    factors = torch.exp2(getattr(tensor, f"_{direction}_scale_inv").float() - 127.0)
    factors = factors.repeat_interleave(GROUP, 1 if direction == "rowwise" else 0)
    return values * factors[: values.shape[0], : values.shape[1]]


def _require(data: Tensor | None, direction: str) -> Tensor:
    if data is None:
        raise RuntimeError(f"a product on FP8 operands: the {direction} data is missing")
    return data


def dequantize(tensor: Any, otype: Any) -> Any:
    """Return the values of a quantized tensor in a plain type."""
    if type(tensor).__name__.startswith("MXFP8"):
        direction = "rowwise" if tensor._rowwise_data is not None else "columnwise"
        return read_groups(tensor, direction).view(getattr(tensor, f"_{direction}_data").shape).to(find_type(otype))
    return tensor.dequantize(dtype=find_type(otype))


def fp8_transpose(tensor: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Return the transpose of FP8 bytes, in ``out`` if it is given."""
    flipped = transpose(tensor)
    return flipped if out is None else out.view(flipped.shape).copy_(flipped)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return a tensor with its first two dimensions swapped, contiguous."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def bgrad_quantize(tensor: Any, quantizer: Any) -> tuple[Tensor, Any]:
    """Return the gradient of a bias, the sum over rows, and the quantized tensor."""
    plain = read_plain(tensor)
    bias = plain.reshape(-1, plain.shape[-1]).float().sum(0).to(plain.dtype)
    return bias, plain if quantizer is None else quantize(plain, quantizer)


def multi_tensor_quantize(tensors: list[Any], quantizers: list[Any]) -> list[Any]:
    """Quantize each tensor by its quantizer."""
    return [quantize(tensor, quantizer) for tensor, quantizer in zip(tensors, quantizers, strict=True)]


def split_quantize(tensor: Tensor, sizes: Any, quantizers: list[Any], disable_bulk_allocation: bool = False) -> list[Any]:
    """Cut a tensor along its first dimension and quantize each part."""
    return multi_tensor_quantize(list(torch.split(tensor, list(sizes))), quantizers)


def finish(values: Tensor, out: Any, quantizer: Any, otype: Any) -> Any:
    """Return what a norm or an activation computed, in FP32: as ``otype``, or quantized; in ``out`` if it is given."""
    kind = find_type(otype)
    if quantizer is None:
        return values.to(kind) if out is None else out.copy_(values.to(kind))
    if type(quantizer).__name__ not in FILL:
        return quantizer(values.to(kind))
    # The kernel with one delayed scale casts from FP32; with the others the output is rounded to its type first.
    rounded = values if type(quantizer).__name__ == "Float8Quantizer" else values.to(kind)
    if out is None:
        out = make_empty(quantizer, values.shape, kind, values.device)
    return quantize(rounded, quantizer, out)
