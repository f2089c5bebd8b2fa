"""The losses of multi-token prediction in a V: computed on pipeline rank 0, logged by the last rank."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper


def take_prediction_losses() -> dict[str, Any]:
    """Remove the losses and counts of multi-token prediction, ``[layers]`` each, from this rank's log, and return them."""
    tracker = MTPLossLoggingHelper.tracker
    taken = {name: value for name, value in tracker.items() if torch.is_tensor(value)}
    for name in taken:
        del tracker[name]
    return taken


def add_prediction_losses(taken: dict[str, Any]) -> None:
    """Add another pipeline rank's losses of multi-token prediction to this rank's log."""
    tracker = MTPLossLoggingHelper.tracker
    for name, value in taken.items():
        tracker[name] = tracker[name] + value if name in tracker else value
    if taken:
        # Upstream averages over the data-parallel group of the rank that computed them; here it is this rank's group.
        tracker["reduce_group"] = None
        tracker["avg_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
