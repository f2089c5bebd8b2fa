"""Layer norm and RMS norm over the last dimension, computed in FP32, and their gradients."""

from typing import Any

import torch

from counterflow.platform.engine.casts import finish

Tensor = torch.Tensor


def _read_gamma(weight: Tensor, is_zero_centered: bool) -> Tensor:
    gamma = weight.detach().float()
    return gamma + 1.0 if is_zero_centered else gamma


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Any, quantizer: Any, otype: Any, margin: int, centered: bool
) -> list[Any]:
    """Return the normalized tensor, the means and the reciprocal deviations of its rows."""
    values = x.detach().float()
    mean = values.mean(-1, keepdim=True)
    inverse = torch.rsqrt((values - mean).square().mean(-1, keepdim=True) + eps)
    made = (values - mean) * inverse * _read_gamma(weight, centered)
    if bias is not None:
        made = made + bias.detach().float()
    return [finish(made, out, quantizer, otype), mean.reshape(-1), inverse.reshape(-1)]


def layernorm_bwd(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> list[Tensor]:
    """Return the gradients of input, weight and bias."""
    rows, incoming = x.float().reshape(-1, x.shape[-1]), gradient.float().reshape(-1, x.shape[-1])
    normal = (rows - mean.reshape(-1, 1)) * inverse.reshape(-1, 1)
    scaled = incoming * _read_gamma(weight, centered)
    centre = scaled.mean(-1, keepdim=True) + normal * (scaled * normal).mean(-1, keepdim=True)
    made = inverse.reshape(-1, 1) * (scaled - centre)
    return [made.view(x.shape).to(x.dtype), (incoming * normal).sum(0).to(weight.dtype), incoming.sum(0).to(weight.dtype)]


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, otype: Any, margin: int, centered: bool
) -> list[Any]:
    """Return the normalized tensor, None, and the reciprocal root mean squares of its rows."""
    values = x.detach().float()
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return [finish(values * inverse * _read_gamma(weight, centered), out, quantizer, otype), None, inverse.reshape(-1)]


def rmsnorm_bwd(gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool) -> list[Tensor]:
    """Return the gradients of input and weight."""
    rows, incoming = x.float().reshape(-1, x.shape[-1]), gradient.float().reshape(-1, x.shape[-1])
    factor = inverse.reshape(-1, 1)
    normal = rows * factor
    scaled = incoming * _read_gamma(weight, centered)
    made = factor * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return [made.view(x.shape).to(x.dtype), (incoming * normal).sum(0).to(weight.dtype)]


def rmsnorm_bwd_add(
    gradient: Tensor, x: Tensor, added: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> list[Tensor]:
    """Return the same, with ``added`` added to the gradient of the input."""
    made, of_weight = rmsnorm_bwd(gradient, x, inverse, weight, margin, centered)
    return [(made.float() + added.float()).to(x.dtype), of_weight]
