"""Checks of the stand-in for Transformer Engine's compiled module, in a process that has nothing else of it.

A job is {"check"}: the name of a function here. References are torch, Transformer Engine's own reference in Python, and
loops that follow a definition.
"""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from typing import Any

import torch
from torch.nn import functional

from counterflow.platform import install_cpu

# The largest relative error of one product, by kind of numbers: of outputs, and of gradients. An MLP has two products.
BOUNDS = {"fp32": (2e-7, 4e-7), "bf16": (4e-3, 5e-3)} | dict.fromkeys(
    ("delayed", "tensorwise", "blockwise", "mxfp8"), (5e-2, 8e-2)
)
SPLITS = [64, 128, 0, 64]
LINEARS = ("Linear", "LayerNormLinear", "RMSNormLinear", "GroupedLinear", "LayerNormMLP")
NORMS = ("LayerNorm", "RMSNorm")


def run(job: dict[str, Any]) -> None:
    """Run one check over the stand-in; it raises if something is wrong."""
    torch.set_num_threads(1)
    install_cpu(engine=True)
    torch.manual_seed(job.get("seed", 0))
    check: Callable[..., None] = globals()[job["check"]]
    check(*job.get("arguments", []))


def be_close(found: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> None:
    off = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
    assert off <= bound, f"{what} is {off:.1e} from the reference, {bound:.1e} is allowed"


def make_recipe(numbers: str) -> Any:
    from transformer_engine.common import recipe

    return {
        "delayed": recipe.DelayedScaling,
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }[numbers]()


def use_recipe(numbers: str) -> Any:
    import transformer_engine.pytorch as te

    return te.autocast(enabled=True, recipe=make_recipe(numbers)) if numbers not in ("fp32", "bf16") else nullcontext()


def build(kind: str, dtype: torch.dtype, *, delays: bool = False, device: str = "cpu") -> Any:
    import transformer_engine.pytorch as te

    torch.manual_seed(7)
    given: dict[str, Any] = {"params_dtype": dtype, "device": device}
    if kind in NORMS:
        return getattr(te, kind)(128, **given)
    given["delay_wgrad_compute"] = delays
    if kind == "GroupedLinear":
        return te.GroupedLinear(4, 128, 256, **given)
    if kind == "LayerNormMLP":
        return te.LayerNormMLP(128, 256, bias=False, normalization="RMSNorm", activation="swiglu", **given)
    norm = {"RMSNormLinear": {"normalization": "RMSNorm"}}.get(kind, {})
    return (te.Linear if kind == "Linear" else te.LayerNormLinear)(128, 256, **given, **norm)


def compute_reference(kind: str, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if kind in NORMS:
        own = functional.layer_norm(x, (128,), p["weight"], p["bias"]) if kind == "LayerNorm" else normalize(x, p["weight"])
    elif kind == "GroupedLinear":
        parts = enumerate(x.split(SPLITS))
        own = torch.cat([functional.linear(part, p[f"weight{i}"], p[f"bias{i}"]) for i, part in parts])
    elif kind == "LayerNormMLP":
        gate, value = functional.linear(normalize(x, p["layer_norm_weight"]), p["fc1_weight"]).chunk(2, -1)
        own = functional.linear(functional.silu(gate) * value, p["fc2_weight"])
    else:
        if kind == "LayerNormLinear":
            x = functional.layer_norm(x, (128,), p["layer_norm_weight"], p["layer_norm_bias"])
        elif kind == "RMSNormLinear":
            x = normalize(x, p["layer_norm_weight"])
        own = functional.linear(x, p["weight"], p["bias"])
    return own


def normalize(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def run_module(module: Any, kind: str, x: torch.Tensor, gradient: torch.Tensor | None, numbers: str) -> list[torch.Tensor]:
    """Return output, the input's gradient and the parameters' gradients; the output's gradient is drawn if it is None."""
    x = x.clone().requires_grad_(True)
    with use_recipe(numbers):
        made = module(x, SPLITS) if kind == "GroupedLinear" else module(x)
    made = made[0] if isinstance(made, tuple) else made
    made.backward(torch.ones_like(made) if gradient is None else gradient)
    if getattr(module, "wgrad_store", None) is not None and module.wgrad_store.delay_wgrad_compute():
        module.backward_dw()
    return [made.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def check_module(kind: str, numbers: str) -> None:
    """A module computes what torch does, as far as its numbers go; delayed weight gradients are those computed at once."""
    dtype = torch.float32 if numbers == "fp32" else torch.bfloat16
    module = build(kind, dtype)
    x = torch.randn(256, 128).to(dtype)
    own = {name: parameter.detach().float().clone().requires_grad_(True) for name, parameter in module.named_parameters()}
    x32 = x.float().clone().requires_grad_(True)
    expected = compute_reference(kind, own, x32)
    gradient = torch.randn(expected.shape).to(dtype)
    expected.backward(gradient.float())
    made, of_input, *of_parameters = run_module(module, kind, x, gradient, numbers)
    forward, backward = (bound * (2 if kind == "LayerNormMLP" else 1) for bound in BOUNDS[numbers])
    be_close(made, expected, forward, "output")
    be_close(of_input, x32.grad, backward, "gradient of the input")
    for (name, parameter), found in zip(own.items(), of_parameters, strict=True):
        be_close(found, parameter.grad, backward, f"gradient of {name}")
    if kind in LINEARS:
        delayed = run_module(build(kind, dtype, delays=True), kind, x, gradient, numbers)
        at_once = [made, of_input, *of_parameters]
        assert all(torch.equal(one, other) for one, other in zip(delayed, at_once, strict=True)), "delayed gradients differ"


def check_attention() -> None:
    """Attention is torch's."""
    import transformer_engine.pytorch as te

    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        attention = te.DotProductAttention(4, 32, attention_dropout=0.0, attn_mask_type="causal", qkv_format="sbhd")
        inputs = [torch.randn(64, 2, 4, 32).to(dtype).requires_grad_(True) for _ in range(3)]
        made = attention(*inputs)
        made.backward(gradient := torch.randn_like(made))
        plain = [one.detach().float().clone().requires_grad_(True) for one in inputs]
        turned = (one.permute(1, 2, 0, 3) for one in plain)
        expected = functional.scaled_dot_product_attention(*turned, is_causal=True).permute(2, 0, 1, 3).reshape(made.shape)
        expected.backward(gradient.float())
        be_close(made, expected, bound, "output")
        for found, own in zip(inputs, plain, strict=True):
            be_close(found.grad, own.grad, bound, "gradient")


def check_current_scaling() -> None:
    """Casts by one scale have, byte for byte, the values of Transformer Engine's reference in Python."""
    from transformer_engine.pytorch import DType
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    for values in (torch.randn(64, 96), torch.randn(64, 96) * 1e-4, torch.zeros(32, 32), torch.randn(16, 16).bfloat16()):
        for dtype, kind in ((DType.kFloat8E4M3, torch.float8_e4m3fn), (DType.kFloat8E5M2, torch.float8_e5m2)):
            own = Float8CurrentScalingQuantizer(fp8_dtype=dtype, device=torch.device("cpu"))(values)
            other = CurrentScalingQuantizerRef(dtype=kind).quantize(values)
            assert torch.equal(own._data.view(kind).float(), other.data.view(kind).float())
            # One of them rounds amax / top, the other 1 / (top / amax).
            be_close(own._scale_inv.reshape(()), other.scale.reshape(()), 2e-7, "scale")
            if own._transpose is not None:
                assert torch.equal(own._transpose, own._data.t())


def check_block_scaling() -> None:
    """Each block's largest value becomes the largest of its type, by the definition, and sizes need not divide by 128."""
    from transformer_engine.pytorch import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    for rows in (1, 128):
        quantizer = Float8BlockQuantizer(
            fp8_dtype=DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=2 if rows > 1 else 1
        )
        values = torch.randn(144, 272) * torch.logspace(-3, 3, 144)[:, None]
        found = quantizer(values).dequantize(dtype=torch.float32)
        for top in range(0, 144, rows):
            for left in range(0, 272, 128):
                block = values[top : top + rows, left : left + 128]
                scale = 2.0 ** torch.floor(torch.log2(448.0 / block.abs().max()))
                expected = (block * scale).to(torch.float8_e4m3fn).float() / scale
                assert torch.equal(found[top : top + rows, left : left + 128], expected), (top, left)


def check_group_scaling() -> None:
    """MXFP8: each 32 values share the smallest power of two under which none is out of range."""
    from transformer_engine.pytorch import DType
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    values = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    quantized = MXFP8Quantizer(fp8_dtype=DType.kFloat8E4M3, rowwise=True, columnwise=True)(values)
    found = quantized.dequantize(dtype=torch.float32)
    for row in range(64):
        for left in range(0, 96, 32):
            group = values[row, left : left + 32]
            factor = 2.0 ** torch.ceil(torch.log2(group.abs().max() / 448.0))
            expected = (group / factor).to(torch.float8_e4m3fn).float() * factor
            assert torch.equal(found[row, left : left + 32], expected), (row, left)


def check_histories() -> None:
    """Delayed scales come from the largest magnitude of the steps before."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    module = te.Linear(32, 32, bias=False, params_dtype=torch.bfloat16, device="cpu")
    recipe = DelayedScaling(amax_history_len=3, amax_compute_algo="max", margin=1)
    for largest, expected in ((8.0, 448 / 8 / 2), (2.0, 448 / 8 / 2), (2.0, 448 / 8 / 2), (2.0, 448 / 2 / 2)):
        x = torch.ones(32, 32).bfloat16() * largest
        with te.autocast(enabled=True, recipe=recipe):
            made = module(x.requires_grad_(True))
        made.sum().backward()
        assert module.fp8_meta["scaling_fwd"].scale[0] == expected, (largest, module.fp8_meta["scaling_fwd"].scale)


def check_adam() -> None:
    """Adam of Transformer Engine is torch's AdamW."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    ours = [torch.nn.Parameter(torch.randn(64, 3)) for _ in range(2)]
    others = [torch.nn.Parameter(one.detach().clone()) for one in ours]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = FusedAdam(ours, **settings), torch.optim.AdamW(others, **settings)
    for _ in range(5):
        for one, other in zip(ours, others, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, others, strict=True):
        be_close(one, other, 1e-6, "parameter")


def check_stale_transpose() -> None:
    """A product that a GPU would run on a missing transpose raises, rather than being right on the CPU alone."""
    from transformer_engine.pytorch import DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    from counterflow.platform.engine.casts import read_matrix

    quantized = Float8CurrentScalingQuantizer(fp8_dtype=DType.kFloat8E4M3, device=torch.device("cpu"))(torch.randn(32, 16))
    rows, columns = read_matrix(quantized, "rowwise"), read_matrix(quantized, "columnwise")
    assert torch.equal(rows, columns)
    quantized._transpose_invalid = True
    try:
        read_matrix(quantized, "columnwise")
    except RuntimeError as error:
        assert "transpose is missing or stale" in str(error)
    else:
        raise AssertionError("a stale transpose was read")


def check_refusals() -> None:
    """What has no stand-in raises with its name."""
    import transformer_engine_torch as stand_in

    for name in ("fused_attn_fwd", "thd_get_partitioned_indices", "moe_permute_fwd", "CommOverlap"):
        try:
            getattr(stand_in, name)()
        except NotImplementedError as error:
            assert f"transformer_engine_torch.{name} has no stand-in" in str(error)
        else:
            raise AssertionError(name)


def check_other_processes() -> None:
    """What multiprocessing starts, as Megatron does to save, finds no files of Transformer Engine: they need the stand-in."""
    import transformer_engine

    from counterflow.platform import engine

    assert metadata.version(engine.PACKAGE) == transformer_engine.__version__ == engine.find_version()
    code = f"import importlib.util, sys; sys.path = {sys.path}; print(importlib.util.find_spec('transformer_engine'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None\n"


def check_gather_of_mixed_types() -> None:
    """Bytes and BF16 that are gathered together arrive as they were sent (two ranks)."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    dist.init_process_group("gloo")
    rank, parts = dist.get_rank(), {torch.uint8: torch.tensor([239, 227, 120]), torch.bfloat16: torch.tensor([1.5, -2.5])}
    sent = [values.to(dtype) + rank for dtype, values in parts.items()]
    received = [torch.zeros(2 * len(one), dtype=one.dtype) for one in sent]
    with _coalescing_manager(dist.group.WORLD):
        for target, source in zip(received, sent, strict=True):
            dist.all_gather_into_tensor(target, source)
    for (dtype, values), target in zip(parts.items(), received, strict=True):
        assert torch.equal(target, torch.cat([values.to(dtype), values.to(dtype) + 1])), target
    dist.destroy_process_group()
