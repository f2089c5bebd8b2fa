"""The plugin's state for DeepSpeed's models and their weights, in weak-keyed tables: an entry goes when its key is freed."""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.utils.weak import WeakTensorKeyDictionary

from counterflow.trainer.layer_chunks import Chunks
from counterflow.trainer.splits import GraphSplits

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
