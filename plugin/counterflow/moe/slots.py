"""Map tokens from logical experts to slots: decide which slot computes each token of a micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from counterflow.arrays import Array
from counterflow.balance.placement import EMPTY, Placement


@dataclass(frozen=True)
class SlotTable:
    """One layer's placement as the tensors that `place_exactly` and `place_evenly` need.

    ``placement`` has one layer. ``held``, ``int64[slots]``, is the expert of each slot, 0 if the slot is empty; ``filled``,
    ``bool[slots]``, tells which slots are not empty. ``shared`` lists the slots of all experts that have more than one, ordered
    by expert, then by slot. The next three have one entry for each slot of ``shared``: ``copies`` is the number of slots of its
    expert, ``turn`` counts these slots from 0, and ``group_start`` is the index in ``shared`` of the first of them.
    ``shared_slots`` is ``shared`` in numpy.
    """

    placement: Placement
    held: torch.Tensor
    filled: torch.Tensor
    shared: torch.Tensor
    copies: torch.Tensor
    turn: torch.Tensor
    shared_slots: Array
    group_start: Array


def make_slot_table(placement: Placement, device: torch.device) -> SlotTable:
    """Return the table of a placement of one layer."""
    (experts,) = placement.experts
    counts = np.bincount(experts[experts != EMPTY], minlength=1)
    shared = np.flatnonzero((experts != EMPTY) & (counts[np.maximum(experts, 0)] > 1))
    shared = shared[np.argsort(experts[shared], kind="stable")]
    _, first, group, copies = np.unique(experts[shared], return_index=True, return_inverse=True, return_counts=True)
    start = first[group]

    def as_tensor(values: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return SlotTable(
        placement,
        as_tensor(np.maximum(experts, 0)),
        as_tensor(experts != EMPTY),
        as_tensor(shared),
        as_tensor(copies[group]),
        as_tensor(np.arange(len(shared)) - start),
        shared,
        start,
    )


def place_exactly(
    routing_map: torch.Tensor, probs: torch.Tensor, table: SlotTable, shares: Array
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slot map ``bool[tokens, slots]`` and its probabilities; each slot gets the number of tokens in ``shares``.

    ``routing_map`` is ``bool[tokens, experts]``, ``probs`` is ``[tokens, experts]``, and ``shares``, ``int64[slots]``, counts
    tokens of this rank. The first tokens of an expert go to its first slot, the next ones to its second, and so on.
    """
    ours = shares[table.shared_slots]
    ends = np.cumsum(ours)
    starts = ends - ours
    base = starts[table.group_start] if len(starts) else starts
    bounds = torch.from_numpy(np.stack((starts - base, ends - base))).to(routing_map.device, non_blocking=True)

    def choose(order: torch.Tensor) -> torch.Tensor:
        return (order > bounds[0]) & (order <= bounds[1])

    return _place(routing_map, probs, table, choose)


def place_evenly(routing_map: torch.Tensor, probs: torch.Tensor, table: SlotTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slot map ``bool[tokens, slots]`` and its probabilities: an expert's tokens take turns over its slots."""
    return _place(routing_map, probs, table, lambda order: (order - 1) % table.copies == table.turn)


def spread_evenly(routing_map: torch.Tensor, source: int) -> torch.Tensor:
    """Return a routing map, ``bool[tokens, experts]``, with as many choices in which all experts have as many tokens.

    Each token gets as many experts as the mean one of ``routing_map``. ``source`` is the number of the rank that routes, so that
    what does not divide goes to other experts on the next one.
    """
    tokens, experts = routing_map.shape
    width = round(int(routing_map.sum()) / max(tokens, 1))
    chosen = (torch.arange(tokens * width, device=routing_map.device) + source * tokens * width) % experts
    return torch.zeros_like(routing_map).scatter_(1, chosen.view(tokens, width), True)


def find_slots(selected: torch.Tensor, slot_map: torch.Tensor, table: SlotTable) -> torch.Tensor:
    """Return the slots ``int64[tokens, k]`` of the experts in ``selected``, where ``slot_map`` has placed their tokens."""
    held = table.held.expand(len(selected), -1)
    # Of an expert's slots at most one has the token; all others add 0.
    numbers = torch.arange(held.shape[1], device=held.device).expand_as(held)
    slot_of = held.new_zeros(len(selected), int(table.placement.homes.shape[1]))  # type: ignore[union-attr]
    return slot_of.scatter_add_(1, held, numbers.where(slot_map, 0)).gather(1, selected)


def _place(
    routing_map: torch.Tensor, probs: torch.Tensor, table: SlotTable, choose: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    slot_map = routing_map[:, table.held] & table.filled
    if len(table.shared_slots):
        wanted = slot_map[:, table.shared]
        # The running sum numbers the tokens of each expert from 1.
        slot_map[:, table.shared] = wanted & choose(wanted.cumsum(0))
    # A product with the map would turn an infinite probability of an expert that was not chosen into NaN.
    return slot_map, probs[:, table.held].masked_fill(~slot_map, 0.0)
