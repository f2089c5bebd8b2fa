"""Modules that stack the weights of all their experts: each parameter is ``[experts, …]``, ``num_experts`` is their number."""

import copy
from typing import Any

import torch

from counterflow.moe.gradients import Part


def list_parts(experts: torch.nn.Module) -> list[list[Part]]:
    """Return the weights of each expert in a module that stacks them."""
    parameters = list(experts.parameters())
    return [[Part(one, index) for one in parameters] for index in range(len(parameters[0]))]


def make_stack(experts: torch.nn.Module, count: int) -> Any:
    """Return a module like ``experts`` with ``count`` experts of weight zero; None for 0. Draws no random number."""
    if not count:
        return None
    stack: Any = copy.copy(experts)
    stack.num_experts = count
    stack._parameters = {
        name: None
        if one is None
        else torch.nn.Parameter(one.data.new_zeros(count, *one.shape[1:]), requires_grad=one.requires_grad)
        for name, one in experts._parameters.items()
    }
    return stack
