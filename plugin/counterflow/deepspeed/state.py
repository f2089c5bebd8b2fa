"""The plugin's state for DeepSpeed's models and their weights, in weak-keyed tables: an entry goes when its key is freed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.utils.weak import WeakTensorKeyDictionary

from counterflow.schedule.layouts import Layout
from counterflow.sections import Chosen
from counterflow.trainer.splits import GraphSplits


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


# The method by which a PipelineModule was cut into stages.
method_of: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
# The chunks of each model that runs tables.
chunks_of: WeakKeyDictionary[Any, Chunks] = WeakKeyDictionary()
# The `counterflow.deepspeed.experts.layer.AutoEPSlots` of each of AutoEP's layers.
slots_of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
# The `counterflow.deepspeed.experts.balancing.EngineBalancer` of each engine with slots, and a reference to it for each weight of
# its experts.
balancer_of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
holder_of: Any = WeakTensorKeyDictionary()
# Optimizers of stages that do not all have MoE layers.
uneven_optimizers: WeakSet[Any] = WeakSet()
# Of each model that runs tables, which stages are split in their autograd graph.
graphs_of: WeakKeyDictionary[Any, GraphSplits] = WeakKeyDictionary()
