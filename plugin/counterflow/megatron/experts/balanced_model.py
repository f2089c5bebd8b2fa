"""Balanced layers for Megatron: process groups, optimizer state, parameter gathers and gradient reductions of its MoE layers."""

from typing import Any

import torch
from megatron.core import parallel_state

from counterflow.megatron.experts.homecoming import hold_reductions
from counterflow.megatron.experts.layer import number_prediction_layers
from counterflow.megatron.experts.optimizer_state import take_state
from counterflow.megatron.gradients import GRADIENTS
from counterflow.megatron.state import layer_slots
from counterflow.options import Options
from counterflow.trainer.balanced_layers import BalancedLayers, ExpertGroups


class BalancedModel(BalancedLayers):
    """The MoE layers in one rank's model chunks; there is at least one. ``optimizer`` has to be set before homes can move."""

    def __init__(self, options: Options, chunks: list[Any]) -> None:
        self._chunks, self.optimizer = chunks, None
        for chunk in chunks:
            number_prediction_layers(chunk)
        slots = [[layer_slots[one] for one in chunk.modules() if one in layer_slots] for chunk in chunks]
        layer = next(one.layer for chunk in slots for one in chunk)
        groups = ExpertGroups(
            experts=layer.ep_group,
            sources=layer.token_dispatcher.tp_ep_group,
            replicas=parallel_state.get_expert_data_parallel_group(),
            stage=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        )
        super().__init__(options, slots, groups, GRADIENTS)
        balanced = [chunk for chunk, some in zip(chunks, slots, strict=True) if some]
        for chunk, clones in zip(balanced, self.clones, strict=True):
            # A model that is only evaluated (--skip-train) has no data parallelism around it.
            if hasattr(chunk, "expert_parallel_bucket_groups"):
                hold_reductions(chunk, clones)

    def take_state(self, parameter: Any) -> list[torch.Tensor]:
        """Return the fp32 master and the moments of a parameter in Megatron's optimizer."""
        return take_state(self.optimizer, parameter)

    def finish_gathers(self) -> None:
        """Wait for the gathers of expert weights that ``--overlap-param-gather`` has started or would start in a forward."""
        for chunk in self._chunks:
            # Without hooks there are no such gathers, as before the first step and in evaluation.
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                for group in chunk.expert_parallel_bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)
