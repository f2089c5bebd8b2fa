"""From logical experts to slots: which slot computes each of a micro-batch's tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from counterflow.arrays import Array
from counterflow.balance.placement import EMPTY, Placement


@dataclass(frozen=True)
class SlotTable:
    """What the slots of one layer hold, laid out for `place_exactly` and `place_evenly`.

    ``placement`` has one layer. ``held``: ``int64[slots]``, the expert of each slot, 0 where it is empty; ``filled``:
    ``bool[slots]``. ``shared``: the slots of experts that have several, ordered by expert and slot; of these, ``copies`` is how
    many their expert has and ``turn`` which of them the slot is; ``group_start`` is the place in ``shared`` of the first.
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
    """Return the slot map ``bool[tokens, slots]`` and its probabilities, as many tokens on each slot as ``shares`` says.

    ``routing_map``: ``bool[tokens, experts]``; ``probs``: ``[tokens, experts]``; ``shares``: ``int64[slots]``, those of this
    rank's tokens. Of an expert's tokens, in their order, the first go to its first slot, and so on.
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


def _place(
    routing_map: torch.Tensor, probs: torch.Tensor, table: SlotTable, choose: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    slot_map = routing_map[:, table.held] & table.filled
    if len(table.shared_slots):
        wanted = slot_map[:, table.shared]
        # From 1: which of its expert's tokens each is.
        slot_map[:, table.shared] = wanted & choose(wanted.cumsum(0))
    # Not a product: what an expert that was not chosen has for a probability is to leave no trace, be it infinite.
    return slot_map, probs[:, table.held].masked_fill(~slot_map, 0.0)
