"""What the plugin keeps for Megatron's chunks, layers and weights: in tables beside them that forget with them, never on them.

A value must not lead back to its key, or neither would ever be freed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from counterflow.moe.clones import Clones


@dataclass
class ChunkState:
    """Of a model chunk."""

    is_on_way_back: bool = False
    """Whether it was built as a V's second."""
    clones: Clones | None = None
    due: list[Callable[[], None]] = field(default_factory=list)
    """Reductions of expert gradients that wait until those of the clones are home."""
    handed_over: dict[Any, int] | None = None
    """Its Transformer Engine modules, once looked for, each with how many of its queued weight gradients are handed over."""


@dataclass
class WeightState:
    """Of a linear's weight."""

    split: Any = None
    """What its backward leaves undone (`counterflow.megatron.pipeline.zero_bubble`)."""
    bucket_group: ref[Any] | None = None
    """The reduction that its gradient is part of, where there is one."""


_chunks: WeakKeyDictionary[Any, ChunkState] = WeakKeyDictionary()
_weights: Any = WeakTensorKeyDictionary()
# The `counterflow.megatron.experts.layer.MegatronSlots` that a MoE layer has.
layer_slots: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
# The chunk's state, of the bucket groups that reduce its experts' gradients.
expert_buckets: WeakKeyDictionary[Any, ChunkState] = WeakKeyDictionary()


def of_chunk(chunk: Any) -> ChunkState:
    """Return what is kept for a model chunk."""
    if chunk not in _chunks:
        _chunks[chunk] = ChunkState()
    return _chunks[chunk]


def of_weight(weight: torch.Tensor) -> WeightState:
    """Return what is kept for a weight."""
    state: WeightState | None = _weights.get(weight)
    if state is None:
        _weights[weight] = state = WeightState()
    return state
