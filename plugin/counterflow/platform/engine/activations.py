"""Activations and their gradients, plain and gated, computed in FP32; softmax of attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from counterflow.platform.engine.casts import finish, read_plain

Tensor = torch.Tensor


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _qgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _srelu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "qgelu": _qgelu,
    "relu": functional.relu,
    "srelu": _srelu,
    "silu": functional.silu,
}
# The first half of the input goes through the function and gates the second half.
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,
    "geglu": _gelu,
    "qgeglu": _qgelu,
    "reglu": functional.relu,
    "sreglu": _srelu,
    "swiglu": functional.silu,
}


def _apply(name: str, x: Tensor) -> Tensor:
    if name in PLAIN:
        return PLAIN[name](x)
    gate, value = x.chunk(2, -1)
    return GATED[name](gate) * value


def differentiate(name: str, gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of an activation's input, in FP32."""
    with torch.enable_grad():
        x = x.detach().float().requires_grad_(True)
        return torch.autograd.grad(_apply(name, x), x, gradient.float())[0]


def list_activations() -> dict[str, Callable[..., Any]]:
    """Return the functions of every activation: forward, backward, and backward together with the gradient of a bias."""
    made: dict[str, Callable[..., Any]] = {}
    for name in (*PLAIN, *GATED):
        made |= {name: _make_forward(name), f"d{name}": _make_backward(name), f"dbias_d{name}": _make_bias_backward(name)}
    return made


def _make_forward(name: str) -> Callable[..., Any]:
    return lambda x, quantizer: finish(_apply(name, read_plain(x).detach().float()), None, quantizer, x.dtype)


def _make_backward(name: str) -> Callable[..., Any]:
    def run(gradient: Any, x: Any, quantizer: Any) -> Any:
        made = differentiate(name, read_plain(gradient), read_plain(x)).view(x.shape)
        return finish(made, None, quantizer, gradient.dtype)

    return run


def _make_bias_backward(name: str) -> Callable[..., Any]:
    def run(gradient: Any, x: Any, quantizer: Any) -> list[Any]:
        made = differentiate(name, read_plain(gradient), read_plain(x)).view(x.shape)
        bias = made.reshape(-1, made.shape[-1]).sum(0).to(gradient.dtype)
        return [bias, finish(made, None, quantizer, gradient.dtype)]

    return run


def scaled_softmax_forward(x: Tensor, scale: float) -> Tensor:
    """Return the softmax of ``scale * x`` over the last dimension."""
    return torch.softmax(x.float() * scale, -1).to(x.dtype)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the same without what ``mask`` marks."""
    return torch.softmax((x.float() * scale).masked_fill(mask.bool(), -10000.0), -1).to(x.dtype)


def scaled_causal_softmax_forward(x: Tensor, scale: float) -> Tensor:
    """Return the same without what comes later; the last row sees all columns."""
    rows, columns = x.shape[-2:]
    later = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
    return torch.softmax((x.float() * scale).masked_fill(later, float("-inf")), -1).to(x.dtype)


def softmax_backward(gradients: Tensor, results: Tensor, scale: float) -> Tensor:
    """Return the gradient of a scaled softmax's input."""
    gradient, result = gradients.float(), results.float()
    return (scale * result * (gradient - (gradient * result).sum(-1, keepdim=True))).to(gradients.dtype)


def list_softmaxes() -> dict[str, Callable[..., Any]]:
    """Return the softmaxes of attention by their names in the compiled module."""
    forwards: dict[str, Callable[..., Any]] = {
        "scaled_softmax": scaled_softmax_forward,
        "scaled_masked_softmax": scaled_masked_softmax_forward,
        "scaled_upper_triang_masked_softmax": scaled_causal_softmax_forward,
        "scaled_aligned_causal_masked_softmax": scaled_causal_softmax_forward,
    }
    backward: Callable[..., Any] = softmax_backward
    return {f"{name}_forward": run for name, run in forwards.items()} | {f"{name}_backward": backward for name in forwards}
