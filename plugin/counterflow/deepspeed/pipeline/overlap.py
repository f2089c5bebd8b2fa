"""Overlapped pairs (``"overlap": true``): all-to-alls hand the rank over, and what an engine knows of its stage goes along.

AutoEP's layers exchange their tokens by DeepSpeed's ``all_to_all_single``, in the forward and in the backward, as its other
layers do that communicate this way.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.runtime.communication import communicate
from counterflow.runtime.handover import Carried, find_flow
from counterflow.trainer.carried import list_engine_state


def hand_over_in(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DeepSpeed's ``all_to_all_single``: in a pair the other part computes while it is under way."""

    @wraps(collective)
    def exchange(output: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if find_flow() is None or args or kwargs.get("async_op"):
            return collective(output, tensor, *args, **kwargs)
        kwargs["async_op"] = True
        return communicate(lambda: collective(output, tensor, **kwargs), lambda work: work.wait(), "all-to-all")

    return exchange


def list_carried(engine: Any) -> list[Carried]:
    """Return what goes with each part of a pair: the stage that the engine runs, and random states of checkpointed layers."""
    from deepspeed.runtime.activation_checkpointing import checkpointing

    tracker = checkpointing.get_cuda_rng_tracker()
    return [
        Carried(lambda: engine.running_stage, engine.set_stage),
        Carried(tracker.get_states, tracker.set_states),
        *list_engine_state(),
    ]
