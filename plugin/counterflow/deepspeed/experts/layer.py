"""AutoEP's MoE layer with slots: the router chooses experts, tokens are sent to slots, and experts have clones.

The layer is upstream's own. Its forward is run on a view of it, in which slots stand in place of experts. The clones are a second
module of the experts' class. It is not a child of the layer, so optimizer, data parallelism and checkpoints do not see it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import ref

import numpy as np
import torch

from counterflow.deepspeed.state import slots_of
from counterflow.moe.clones import LayerExperts
from counterflow.moe.layer import LayerSlots
from counterflow.moe.stacks import list_parts, make_stack
from counterflow.options import Options


class AutoEPSlots(LayerSlots):
    """The slots of one of AutoEP's layers; ``number`` is the layer's number in the model."""

    def __init__(self, layer: Any, number: int, options: Options) -> None:
        # A weak reference: this is the value of a weak-keyed table whose key is the layer.
        self._find_layer, self.number = ref(layer), number
        self._is_seen_in_forward = False
        count = options.eplb_clones_per_rank
        self.clone_module = None
        if count:
            self.clone_module = make_stack(layer.experts, count)
            self.clone_module.num_experts = count
        ranks = np.arange(layer.ep_size)
        super().__init__(layer.num_local_experts, count, layer.ep_group, ranks, is_exact=options.eplb_split == "exact")
        self.width = layer.num_local_experts + count

    @property
    def layer(self) -> Any:
        """The MoE layer."""
        return self._find_layer()

    @property
    def is_training(self) -> bool:
        """Whether the layer trains. What a checkpoint recomputes in the backward counts only if its forward had no gradients."""
        is_recomputing, is_training = torch._C._current_graph_task_id() != -1, bool(self.layer.training)
        self._is_seen_in_forward |= is_training and torch.is_grad_enabled() and not is_recomputing
        return is_training and not (is_recomputing and self._is_seen_in_forward)

    def list_experts(self) -> LayerExperts:
        """Return this rank's slots: parts of the parameters that stack its experts."""
        clones = list_parts(self.clone_module) if self.clone_module is not None else []
        return LayerExperts(list_parts(self.layer.experts), clones)

    def run_experts(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run tokens, sorted by slot, by homes and clones; ``counts``, ``[slots of this rank]``, are their numbers."""
        if self.clone_module is None:
            return self.layer.experts(tokens, counts)  # type: ignore[no-any-return]
        at_home = int(counts[: self._own].sum())
        self.finish_refresh()
        own = self.layer.experts(tokens[:at_home], counts[: self._own])
        return torch.cat((own, self.clone_module(tokens[at_home:], counts[self._own :])))


class SlotView:
    """What upstream's forward sees of a layer: slots in place of experts. All else is the layer's own."""

    # Counts are known on the host only after tokens are dealt.
    async_split_plan = False

    def __init__(self, layer: Any, slots: AutoEPSlots) -> None:
        self._layer, self._slots = layer, slots
        self.num_local_experts = slots.width
        self.num_experts = slots.width * layer.ep_size
        self.experts = slots.run_experts
        # Upstream adds the tokens of each slot; those of each expert are added to the layer's.
        self.tokens_per_expert = layer.tokens_per_expert.new_zeros(self.num_experts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def router(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the router's scores, the slots ``[tokens, k]`` of the experts it chose, and how many tokens each slot has."""
        from deepspeed.moe.ep_count import count_tokens_per_expert

        scores, selected, counts = self._layer.router(tokens, bias)
        with torch.no_grad():
            self._layer.tokens_per_expert.add_(counts)
        slots = self._slots.deal_selected(selected)
        return scores, slots, count_tokens_per_expert(slots, self.num_experts)


def deal_to_slots(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of AutoEP's layers: one that has slots runs on its view."""

    @wraps(forward)
    def run(self: Any, hidden_states: torch.Tensor) -> Any:
        slots = slots_of.get(self)
        return forward(self if slots is None else SlotView(self, slots), hidden_states)

    return run
