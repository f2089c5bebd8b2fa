"""Refuse what cannot work, or has not been shown to, with Transformer Engine and FP8, before any process group is made."""

import sys
from typing import Any

import torch

from counterflow.errors import OptionError
from counterflow.megatron.batches import get_argument as _get

# Products of FP8 tensors take sizes that divide by this.
MULTIPLE = 16
SIZES = {
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size",
    "moe_shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size",
}
# Until somebody shows them right under a schedule or with clones. The fused operations keep weight gradients in their own queues.
UNKNOWN = {
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser, whose fused experts keep theirs to themselves",
    "tp_comm_overlap": "--tp-comm-overlap, whose user buffers take the order of Megatron's own schedule",
    "moe_single_grouped_weight": "--moe-single-grouped-weight, one tensor for all experts of a rank",
    "moe_single_grouped_bias": "--moe-single-grouped-bias, one tensor for all experts of a rank",
}


def check_engine(args: Any, ours: str) -> None:
    """Check flat ``args`` for a run under ``ours``, a flag of this plugin. Raises `OptionError`."""
    is_engine = getattr(args, "transformer_impl", "transformer_engine") == "transformer_engine"
    if is_engine:
        for name, flag in UNKNOWN.items():
            if getattr(args, name, None):
                raise OptionError(f"{ours} does not run with {flag}, in this version: drop one of the two")
    if getattr(args, "fp8", None):
        _check_fp8(args, is_engine=is_engine)
    if is_engine and getattr(sys.modules.get("transformer_engine_torch"), "is_stand_in", False):
        _check_stood_in(args)


def _check_fp8(args: Any, *, is_engine: bool) -> None:
    given, recipe = f"--fp8-format {args.fp8}", _get(args, "fp8_recipe", "delayed")
    if not is_engine:
        raise OptionError(
            f"{given} needs Transformer Engine's layers, --transformer-impl {args.transformer_impl} given: give "
            f"transformer_engine, or drop {given}"
        )
    if recipe == "mxfp8" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 10:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise OptionError(
            f"--fp8-recipe mxfp8 needs a GPU of compute capability 10.0 (Blackwell), this one has {capability}: give delayed, "
            "tensorwise or blockwise"
        )
    if getattr(args, "fp8_param_gather", None) and getattr(args, "use_cpu_initialization", None):
        raise OptionError(
            "--fp8-param-gather with --use-cpu-initialization: weights are quantized before they are filled, so the first step "
            "is NaN: drop --use-cpu-initialization"
        )
    for name, flag in SIZES.items():
        size = getattr(args, name, None)
        if size and size % MULTIPLE:
            low = size // MULTIPLE * MULTIPLE
            near = f"{low} or {low + MULTIPLE}" if low else str(MULTIPLE)
            raise OptionError(f"{given} takes sizes in multiples of {MULTIPLE}, {flag} is {size}: set it to {near}")


def _check_stood_in(args: Any) -> None:
    """Refuse what needs kernels that the CPU platform's stand-in lacks."""
    platform = "the CPU platform's stand-in for Transformer Engine"
    parts = _get(args, "context_parallel_size", 1)
    if parts > 1:
        raise OptionError(f"--context-parallel-size {parts}: {platform} has no attention over parts of a sequence: give 1")
    if getattr(args, "fp4", None):
        raise OptionError(f"--fp4-format {args.fp4}: {platform} has no FP4 casts: drop it")
