"""The plugin's state for Megatron's chunks, layers and weights, in weak-keyed tables: an entry goes when its key is freed.

A value must not refer to its key, or neither would ever be freed.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from counterflow.moe.clones import Clones
from counterflow.trainer.balancer import Waiting


@dataclass
class ChunkState:
    """The state of a model chunk."""

    is_on_way_back: bool = False
    """Whether it was built as the second chunk of a V."""
    clones: Clones | None = None
    due: Waiting = field(default_factory=Waiting)
    """Reductions of expert gradients that wait for the gradients of clones."""
    engine_modules: list[Any] | None = None
    """Its Transformer Engine modules that have queues of weight gradients; None before the first search for them."""


@dataclass
class WeightState:
    """The state of a linear's weight."""

    split: Any = None
    """The weight's deferred gradients (`counterflow.megatron.pipeline.zero_bubble`)."""
    bucket_group: ref[Any] | None = None
    """The bucket group in which its gradient is reduced, if there is one."""


_chunks: WeakKeyDictionary[Any, ChunkState] = WeakKeyDictionary()
_weights: Any = WeakTensorKeyDictionary()
# The `counterflow.megatron.experts.layer.MegatronSlots` of each MoE layer.
layer_slots: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
# How many of its queued weight gradients were deferred, for each module of Transformer Engine.
handed_over: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
# The chunk's state for each bucket group that reduces gradients of its experts.
expert_buckets: WeakKeyDictionary[Any, ChunkState] = WeakKeyDictionary()


def of_chunk(chunk: Any) -> ChunkState:
    """Return the state of a model chunk."""
    if chunk not in _chunks:
        _chunks[chunk] = ChunkState()
    return _chunks[chunk]


def of_weight(weight: torch.Tensor) -> WeightState:
    """Return the state of a weight."""
    state: WeightState | None = _weights.get(weight)
    if state is None:
        _weights[weight] = state = WeightState()
    return state
