"""Checkpoints as plain dictionaries, without process groups or Megatron."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def read_tensors(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a torch_dist checkpoint, weights and optimizer state, by its key."""
    found: dict[str, Any] = {}
    reader = FileSystemReader(directory / f"iter_{step:07d}")
    planner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    _load_state_dict(found, storage_reader=reader, planner=planner, no_dist=True)
    return {key: value for key, value in _flatten(found).items() if isinstance(value, torch.Tensor)}


def list_entries(directory: Path, step: int) -> dict[str, object]:
    """Return all keys of a torch_dist checkpoint, with the type and shape of those that are tensors."""
    entries = FileSystemReader(directory / f"iter_{step:07d}").read_metadata().state_dict_metadata
    return {
        key: (entry.properties.dtype, tuple(entry.size)) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in entries.items()
    }


def _flatten(tree: object, path: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        return {key: value for name, part in tree.items() for key, value in _flatten(part, f"{path}.{name}").items()}
    if isinstance(tree, list):
        return {key: value for index, part in enumerate(tree) for key, value in _flatten(part, f"{path}.{index}").items()}
    return {path.lstrip("."): tree}


def measure_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two tensors over the other's largest value."""
    if one.numel() == 0 or not other.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    scale = max(float(other.abs().max()), 1e-30)
    return float((one.double() - other.double()).abs().max()) / scale
