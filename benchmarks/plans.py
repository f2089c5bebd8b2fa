"""Pairs through Megatron's own layer schedule plans, as a contestant of `benchmarks.overlap`.

Upstream's ``combined_forward_backward_step`` issues the nodes (attention, dispatch, experts, combine) of an F and a B alternately
to a compute and a communication stream. What is ours: a weight gradient that a layer's experts or attention defer runs where
upstream calls ``backward_dw``, behind the input gradients, so that the next all-to-all need not wait for it.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from megatron.core.pipeline_parallel import combined_1f1b
from megatron.core.pipeline_parallel.utils import ScheduleNode, set_streams

from counterflow.devices import make_event
from counterflow.patching import Patches
from counterflow.runtime.weight_grads import hold_weight_grads


class Plans:
    """Runs forwards and backwards of one model chunk through its plans."""

    def __init__(self, model: Any, forward_step: Callable[..., Any], microbatches: int) -> None:
        set_streams()
        self._model, self._forward_step, self._microbatches = model, forward_step, microbatches
        self._losses: list[Any] = []
        self._output: Any = None

    def run(self, *, forward: bool, backward: bool) -> None:
        """Run a forward, the backward of the forward before, or both as a pair."""
        config = self._model.config
        given = {
            "forward_step_func": self._forward_step,
            "data_iterator": None,
            "f_model": self._model if forward else None,
            "num_microbatches": self._microbatches,
            "input_tensor": None,
            "forward_data_store": self._losses,
            "b_model": self._model if backward else None,
            "b_input_tensor": None,
            "b_output_tensor": self._output if backward else None,
            "b_output_tensor_grad": None,
            "config": config,
            "f_model_chunk_id": None,
            "is_first_microbatch": False,
            "current_microbatch": 0,
        }
        known = inspect.signature(combined_1f1b.combined_forward_backward_step).parameters
        self._output, _, _ = combined_1f1b.combined_forward_backward_step(**{k: v for k, v in given.items() if k in known})


def hold_weight_grads_in_nodes(patches: Patches) -> None:
    """Let the nodes of plans hold what is deferred in their backward until upstream calls their ``backward_dw``."""
    from megatron.core.models.common.utils import TransformerLayerNode as Node

    held: dict[Any, list[Callable[[], None]]] = {}
    backward_impl, backward_dw = Node.backward_impl, Node.backward_dw

    def compute(node: Any) -> tuple[()]:
        for fn in held.pop(node, ()):
            fn()
        return ()

    @wraps(backward_impl)
    def run_and_hold(self: Any, *args: Any) -> Any:
        if not self.bwd_dw_callables:
            return backward_impl(self, *args)
        with hold_weight_grads() as queue:
            result = backward_impl(self, *args)
        held[self] = queue
        return result

    @wraps(backward_dw)
    def run_held(self: Any) -> None:
        ScheduleNode(partial(compute, self), self.stream, make_event(), name=f"{self.name} weight gradients").forward()
        backward_dw(self)

    patches.set(Node, "backward_impl", run_and_hold)
    patches.set(Node, "backward_dw", run_held)
