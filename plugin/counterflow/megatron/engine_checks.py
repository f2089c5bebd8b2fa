"""Refuse what cannot work, or has not been shown to, with Transformer Engine and FP8, before any process group is made."""

import importlib.util
import sys
import warnings
from importlib import metadata
from typing import Any

import torch

from counterflow.errors import OptionError
from counterflow.megatron.batches import get_argument as _get
from counterflow.megatron.fp8_checks import check_fp8

NAME = "transformer_engine"
OF_HYBRID = "megatron.core.models.hybrid"
# How much of an error is shown.
REASON = 160
# Until somebody shows them right under a schedule or with clones. The fused operations keep weight gradients in their own queues.
UNKNOWN = {
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser, whose fused experts keep theirs to themselves",
    "tp_comm_overlap": "--tp-comm-overlap, whose user buffers take the order of Megatron's own schedule",
    "moe_single_grouped_weight": "--moe-single-grouped-weight, one tensor for all experts of a rank",
    "moe_single_grouped_bias": "--moe-single-grouped-bias, one tensor for all experts of a rank",
}


def check_engine(args: Any, ours: str) -> None:
    """Check flat ``args`` for a run under ``ours``, a flag of this plugin. Raises `OptionError`."""
    # Without the argument, as in a YAML file that leaves it to the model's config, Megatron takes Transformer Engine.
    is_engine = getattr(args, "transformer_impl", NAME) == NAME
    if is_engine:
        for name, flag in UNKNOWN.items():
            if getattr(args, name, None):
                raise OptionError(f"{ours} does not run with {flag}, in this version: drop one of the two")
    # A spec of the user's own names its layers itself, upstream's of HybridModel names Transformer Engine's.
    spec = getattr(args, "spec", None)
    if getattr(args, "transformer_impl", None) == NAME and (not spec or spec[0].startswith(OF_HYBRID)):
        _check_importable()
    if getattr(args, "fp8", None):
        if not is_engine:
            raise OptionError(
                f"--fp8-format {args.fp8} needs Transformer Engine's layers, --transformer-impl {args.transformer_impl} given: "
                f"give transformer_engine, or drop --fp8-format {args.fp8}"
            )
        check_fp8(args)
    elif getattr(args, "fp8_param_gather", None):
        raise OptionError("--fp8-param-gather keeps weights in FP8 and --fp8-format is not given: add it, or drop the first")
    if is_engine and getattr(sys.modules.get("transformer_engine_torch"), "is_stand_in", False):
        _check_stood_in(args)


def check_installed() -> None:
    """Refuse an installed Transformer Engine that ends Megatron's imports; Megatron itself takes an `ImportError` for none."""
    if (fault := find_fault()) is not None and not isinstance(fault, ImportError):
        raise OptionError(f"{describe_fault(fault)}, or uninstall it: Megatron imports it, whatever --transformer-impl says")


def _check_importable() -> None:
    if not is_installed():
        raise OptionError(
            f"--transformer-impl {NAME}, Megatron's default, needs Transformer Engine, which is not installed: install it, or "
            f"give --transformer-impl local; on the CPU platform write --transformer-impl {NAME} on the command line, then it "
            "runs over a stand-in"
        )
    if (fault := find_fault()) is not None:
        raise OptionError(f"{describe_fault(fault)}, or give --transformer-impl local")


def is_installed() -> bool:
    """Tell whether there is a Transformer Engine to import, as it should or not."""
    return NAME in sys.modules or importlib.util.find_spec(NAME) is not None


def find_fault() -> Exception | None:
    """Return what an import of Transformer Engine raises; None if it can be imported, and where it is not installed."""
    if not is_installed():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As Megatron imports it.
            importlib.import_module(f"{NAME}.pytorch.fp8")
    except Exception as error:
        return error
    return None


def describe_fault(fault: Exception) -> str:
    """Return in one line that an installed Transformer Engine cannot be imported, and what to do."""
    found = next(iter(metadata.distributions(name=NAME)), None)
    version = found.version if found is not None else ""
    reason = " ".join(str(fault).split())
    return (
        f"Transformer Engine {version} cannot be imported beside torch {torch.__version__}, as if it were compiled for another "
        f"({type(fault).__name__}: {reason[:REASON]}): install one for this torch by pip install --no-build-isolation "
        f"--force-reinstall --no-deps 'transformer-engine[pytorch]=={version}'"
    )


def _check_stood_in(args: Any) -> None:
    """Refuse what needs kernels that the CPU platform's stand-in lacks."""
    platform = "the CPU platform's stand-in for Transformer Engine"
    parts = _get(args, "context_parallel_size", 1)
    if parts > 1:
        raise OptionError(f"--context-parallel-size {parts}: {platform} has no attention over parts of a sequence: give 1")
    if getattr(args, "fp4", None):
        raise OptionError(f"--fp4-format {args.fp4}: {platform} has no FP4 casts: drop it")
