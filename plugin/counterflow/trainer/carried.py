"""Global state of libraries that goes with each part of an overlapped pair, whatever the trainer."""

import sys
from collections.abc import Callable
from typing import Any

from counterflow.errors import SeamError
from counterflow.runtime.handover import Carried

# How Transformer Engine's variables end that say whether it runs inside a recomputed region, and in which of its two passes.
RECOMPUTING = ("ACTIVATION_RECOMPUTE_REGION", "ACTIVATION_RECOMPUTE_ENABLED", "ACTIVATION_RECOMPUTE_PHASE")


def list_engine_state() -> list[Carried]:
    """Return what Transformer Engine knows of the FP8 context and of the recomputed region that it is in.

    The depth of the context counts: where it is left for depth 0, delayed scales are updated. Raises `SeamError` if the state is
    not where it is known to be.
    """
    home = sys.modules.get("transformer_engine.pytorch.quantization") or sys.modules.get("transformer_engine.pytorch.fp8")
    manager = getattr(home, "FP8GlobalStateManager", None)
    if manager is None:
        return []
    state = getattr(manager, "quantization_state", manager)
    depth = next((name for name in ("autocast_depth", "FP8_AUTOCAST_DEPTH") if hasattr(state, name)), "")
    kept = next((name for name in ("autocast_state", "fp8_autocast_state") if hasattr(manager, f"get_{name}")), "")
    if not (depth and kept):
        raise SeamError(
            "this Transformer Engine keeps the state of its FP8 context where it is not known to be, so a pair would mix that of "
            "its F and its B: drop --cf-overlap"
        )
    recomputing = sys.modules.get("transformer_engine.pytorch.distributed")
    flags = [name for name in vars(recomputing) if name.endswith(RECOMPUTING)] if recomputing is not None else []
    return [
        Carried(getattr(manager, f"get_{kept}"), getattr(manager, f"set_{kept}")),
        carry_attributes(lambda: getattr(manager, "quantization_state", manager), [depth]),
        carry_attributes(lambda: recomputing, flags),
    ]


def carry_attributes(find: Callable[[], Any], names: list[str]) -> Carried:
    """Return these attributes of what ``find`` returns, as something that goes with each part of a pair."""

    def capture() -> list[Any]:
        return [getattr(find(), name) for name in names]

    def restore(values: list[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(find(), name, value)

    return Carried(capture, restore)
