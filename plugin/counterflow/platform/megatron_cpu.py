"""The few Megatron functions that reach past ``torch.cuda``'s public names.

Each is replaced where it lives and wherever it was imported by name; see `platform.cpu` for the rest.
"""

import importlib
from typing import Any

import torch

from counterflow.patching import Patches


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _keep_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # Upstream converts to numpy only on the way from a GPU; all_to_all wants plain integers either way.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _compile_where_missing(compile_helpers: Any) -> Any:
    def compile_or_reuse_helpers() -> None:
        # The wheel ships the compiled helper and no makefile; a checkout has the makefile.
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            compile_helpers()

    return compile_or_reuse_helpers


def install(patches: Patches) -> None:
    """Replace Megatron-Core's CUDA random state, host copies and helper build; log into ``patches``."""
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.tensor_parallel import random as rng
    from megatron.core.transformer.moe import moe_utils

    patches.replace(rng, "_get_cuda_rng_state", lambda original: _get_rng_state)
    patches.replace(rng, "_set_cuda_rng_state", lambda original: _set_rng_state)
    patches.replace(moe_utils, "maybe_move_tensor_to_cpu", lambda original: _keep_on_cpu)
    patches.replace(dataset_utils, "compile_helpers", _compile_where_missing)
