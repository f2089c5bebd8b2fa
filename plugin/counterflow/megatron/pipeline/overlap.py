"""Overlapped pairs (``--cf-overlap``): Megatron's expert communications hand the rank over, and its global state goes along.

A MoE layer's dispatch and combine, whichever dispatcher carries them out, are marked as communications, and so are their
backwards (`counterflow.runtime.communication`). Upstream's functions stay as they are: inside them its collectives do not wait.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.utils import GlobalMemoryBuffer

from counterflow.devices import find_device
from counterflow.megatron.state import layer_slots
from counterflow.runtime.communication import Mark, defer, run_marked
from counterflow.runtime.handover import Carried, find_flow
from counterflow.trainer.carried import list_engine_state

# Dispatchers whose `token_dispatch` returns what its collectives write, tokens and probabilities: one hand-over for all.
TOGETHER = ("alltoall", "allgather")


def mark_dispatch(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``MoELayer.dispatch``: it is a communication."""

    @wraps(dispatch)
    def run_dispatch(layer: Any, *args: Any) -> Any:
        mark = Mark(f"dispatch of layer {layer.layer_number}", layer.config.moe_token_dispatcher_type in TOGETHER)
        return run_marked(partial(_run_without_buffer, dispatch, layer), *args, mark=mark, state=_list_state(layer))

    return run_dispatch


def _run_without_buffer(function: Callable[..., Any], *args: Any) -> Any:
    """Run what upstream would let gather into its global buffer: what is still to arrive gets memory of its own."""
    buffer = parallel_state._GLOBAL_MEMORY_BUFFER
    parallel_state._GLOBAL_MEMORY_BUFFER = _NoBuffer()
    try:
        return function(*args)
    finally:
        parallel_state._GLOBAL_MEMORY_BUFFER = buffer


class _NoBuffer:
    """Stands for Megatron's global buffer and keeps nothing."""

    def get_tensor(self, shape: Any, dtype: torch.dtype, name: str, mem_alloc_context: Any = None) -> torch.Tensor:
        """Return a new tensor."""
        return torch.empty(shape, dtype=dtype, device=find_device())


def mark_combine(combine: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``MoELayer.combine``: it is a communication. The allgather dispatcher reads what it brings at once."""

    @wraps(combine)
    def run_combine(layer: Any, *args: Any) -> Any:
        mark = Mark(f"combine of layer {layer.layer_number}", together=False)
        return run_marked(partial(combine, layer), *args, mark=mark, state=_list_state(layer))

    return run_combine


def hand_over_in(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective of ``torch.distributed``: inside a marked function it does not wait."""
    return defer(collective)


def hand_over_before(current_stream_wait: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the wait for a transfer of DeepEP: inside a marked function the rank is handed over before it (untested on GPU)."""

    @wraps(current_stream_wait)
    def wait(event: Any) -> None:
        flow = find_flow()
        if flow is None or flow.region is None:
            current_stream_wait(event)
        else:
            flow.region.wait_for(partial(current_stream_wait, event))

    return wait


def _list_state(layer: Any) -> list[dict[str, Any]]:
    """Return the attributes in which a layer keeps what it has dispatched until it is combined.

    In a pair the other part may run the same layer, in a forward that is recomputed.
    """
    dispatcher, slots = layer.token_dispatcher, layer_slots.get(layer)
    dealt = slots.dealt if slots is not None else None
    keepers = (dispatcher, getattr(dispatcher, "_comm_manager", None), dispatcher.shared_experts, dealt)
    return [vars(one) for one in keepers if one is not None]


def list_carried() -> list[Carried]:
    """Return Megatron's global state that goes with each part of a pair."""
    spare = GlobalMemoryBuffer()
    return [
        _carry_variable("_MPU_PIPELINE_MODEL_PARALLEL_RANK"),
        # What one part gathers into the buffer would be overwritten by the other.
        _carry_variable("_GLOBAL_MEMORY_BUFFER", lambda: spare),
        Carried(_capture_tracker, lambda attributes: vars(random.get_cuda_rng_tracker()).update(attributes)),
        *list_engine_state(),
    ]


def _carry_variable(name: str, begin: Callable[[], Any] | None = None) -> Carried:
    return Carried(lambda: getattr(parallel_state, name), partial(setattr, parallel_state, name), begin)


def _capture_tracker() -> dict[str, Any]:
    """Return what the tracker of random numbers knows: its states, and in newer versions which of them is in force."""
    attributes = vars(random.get_cuda_rng_tracker())
    return {name: dict(value) if isinstance(value, dict) else value for name, value in attributes.items()}
