"""AutoEP's MoE layer with slots: the router chooses experts, tokens are sent to slots, and experts have clones.

The layer is upstream's own. Its forward is run on a view of it, in which slots stand in place of experts. The clones are a second
module of the experts' class. It is not a child of the layer, so optimizer, data parallelism and checkpoints do not see it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch

from counterflow.deepspeed.state import slots_of
from counterflow.moe.clones import LayerExperts
from counterflow.moe.just_in_time import Loan
from counterflow.moe.layer import LayerSlots
from counterflow.moe.stacks import list_parts, make_stack
from counterflow.options import Options


class AutoEPSlots(LayerSlots):
    """The slots of one of AutoEP's layers; ``number`` is the layer's number in the model."""

    def __init__(self, layer: Any, number: int, options: Options) -> None:
        self.refer_to(layer)
        self.number = number
        count, shared = options.layer_clones, options.shared_clones
        self.clone_module, self.shared_module = (make_stack(layer.experts, one) for one in (count, shared))
        ranks, is_exact = np.arange(layer.ep_size), options.eplb_split == "exact"
        super().__init__(layer.num_local_experts, count, layer.ep_group, ranks, is_exact=is_exact, shared=shared)
        self.width = layer.num_local_experts + count + shared

    @property
    def is_training(self) -> bool:
        """Whether the layer trains, and its tokens are not counted yet."""
        return self.is_first_pass(self.layer.training)

    def list_experts(self) -> LayerExperts:
        """Return this rank's slots: parts of the parameters that stack its experts."""
        clones, shared = (list_parts(module) if module is not None else [] for module in (self.clone_module, self.shared_module))
        return LayerExperts(list_parts(self.layer.experts), clones, shared=shared)

    def run_experts(self, loan: Loan | None, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run tokens, sorted by slot, by homes and clones; ``counts``, ``[slots of this rank]``, are their numbers.

        ``loan`` is what was cloned for these tokens alone.
        """
        at_home, lent = int(counts[: self._own].sum()), int(counts[self._own + self._per_rank :].sum())
        resident = int(counts[self._own : self._own + self._per_rank].sum())
        if not resident and not lent:
            return self.give_back(loan, self.layer.experts(tokens, counts[: self._own]))[0]
        outputs = [self.layer.experts(tokens[:at_home], counts[: self._own])]
        # Behind all slots come rows that belong to none: the last module gets them.
        shared = int(counts.sum()) - lent if lent else len(tokens)
        if resident:
            self.finish_refresh()
            outputs.append(self.clone_module(tokens[at_home:shared], counts[self._own : self._own + self._per_rank]))
        is_taker = lent > 0 and loan is not None and any(one.clone_rank == self._group.rank() for one in loan.lent)
        if lent:
            # Upstream pads an expert without tokens.
            rest = tokens[shared:]
            counts = counts[self._own + self._per_rank :]
            outputs.append(self._run_shared(loan, rest, counts) if is_taker else torch.zeros_like(rest))
        output = torch.cat(outputs)
        return output if is_taker else self.give_back(loan, output)[0]

    def _run_shared(self, loan: Loan | None, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert self._just_in_time is not None and loan is not None
        given = self.give_back(loan, tokens)
        return self._just_in_time.compute(loan, lambda own: self.shared_module(own, counts), *given)


class SlotView:
    """What upstream's forward sees of a layer: slots in place of experts. All else is the layer's own."""

    # Counts are known on the host only after tokens are dealt.
    async_split_plan = False

    def __init__(self, layer: Any, slots: AutoEPSlots) -> None:
        self._layer, self._slots = layer, slots
        self.num_local_experts = slots.width
        self.num_experts = slots.width * layer.ep_size
        self.loan: Loan | None = None
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
        # The view is of this forward alone: in an overlapped pair the layer may run another one meanwhile.
        self.loan = self._slots.dealt.loan
        return scores, slots, count_tokens_per_expert(slots, self.num_experts)

    def experts(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run the tokens of this rank's slots."""
        return self._slots.run_experts(self.loan, tokens, counts)


def deal_to_slots(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of AutoEP's layers: one that has slots runs on its view."""

    @wraps(forward)
    def run(self: Any, hidden_states: torch.Tensor) -> Any:
        slots = slots_of.get(self)
        if slots is None:
            return forward(self, hidden_states)
        view = SlotView(self, slots)
        output = forward(view, hidden_states)
        if isinstance(output, tuple):
            return slots.recall(view.loan, output[0]), *output[1:]
        return slots.recall(view.loan, output)

    return run
