"""The plugin's state for DeepSpeed's models and their weights, in weak-keyed tables: an entry goes when its key is freed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.utils.weak import WeakTensorKeyDictionary

from counterflow.deepspeed.section import Chosen
from counterflow.schedule.layouts import Layout


@dataclass
class Chunks:
    """The model chunks of one rank: chunk c is the stage ``layout.stages[rank][c]`` of the model."""

    chosen: Chosen
    layout: Layout
    rank: int
    bounds: list[tuple[int, int]]
    """The layers of each chunk, from and up to."""
    functions: list[list[Callable[..., Any]]] = field(default_factory=list)
    """What each chunk runs."""
    recomputed: list[list[bool]] = field(default_factory=list)
    """Of each chunk, which groups of layers activation checkpointing recomputes."""

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages on this rank."""
        return self.layout.stages[self.rank]

    def holds(self, stage: int) -> bool:
        """Tell whether the stage is on this rank."""
        return stage in self.stages


class Place(NamedTuple):
    """Where an optimizer keeps a weight's gradient: its group, and its number there."""

    optimizer: ref[Any]
    group: int
    number: int


# The method by which a PipelineModule was cut into stages.
method_of: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
# The chunks of each model that runs tables.
chunks_of: WeakKeyDictionary[Any, Chunks] = WeakKeyDictionary()
# The place of each weight of a model that runs tables.
place_of: Any = WeakTensorKeyDictionary()
# The `counterflow.deepspeed.experts.layer.AutoEPSlots` of each of AutoEP's layers.
slots_of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
# The `counterflow.deepspeed.experts.balancing.Balancer` of each engine with slots, and a reference to it for each weight of its
# experts.
balancer_of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
holder_of: Any = WeakTensorKeyDictionary()
# Optimizers of stages that do not all have MoE layers.
uneven_optimizers: WeakSet[Any] = WeakSet()
