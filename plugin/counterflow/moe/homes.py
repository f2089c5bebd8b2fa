"""Re-homing: experts change the rank on which their home is; weights and optimizer state move with them.

An expert keeps its place among the homes of a rank. At one place all ranks have the same parameters in the same order, and the
same shards of the optimizer's state. So a rank sends its part of an expert unchanged to the rank that has the same part of the
other expert.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.placement import Placement

# Returns the tensors of the home at (layer, place), in which those of another home can be put.
Take = Callable[[int, int], list[torch.Tensor]]


def move_homes(old: Placement, new: Placement, group: dist.ProcessGroup, take: Take) -> tuple[int, int]:
    """Move every home that is on another rank in ``new`` than in ``old``.

    Return how many moved on all ranks of ``group``, and the bytes that this rank sent. A rank moves one tensor of one expert at a
    time, so that receive buffers take the room of one. Every rank calls this with the same two placements. Their homes may differ
    by exchanges between ranks only, as those of `plan_homes` do.
    """
    rank, peers = group.rank(), dist.get_process_group_ranks(group)
    giver, taker = find_exchanges(old, new)
    size = 0
    for layer, place in np.argwhere(giver[:, rank] != rank).tolist():
        to, origin = peers[taker[layer, rank, place]], peers[giver[layer, rank, place]]
        for tensor in leave_out_parts(take(layer, place)):
            arrived = torch.empty_like(tensor)
            operations = [dist.P2POp(dist.isend, tensor.detach(), to, group), dist.P2POp(dist.irecv, arrived, origin, group)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            tensor.copy_(arrived)
            size += tensor.numel() * tensor.element_size()
    return int((giver != np.arange(len(peers))[:, None]).sum()), size


def leave_out_parts(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors without those that are part of an earlier one: a master may be a view of its fp32 weight.

    Such a part has moved with the whole, and what a rank then sent of it would be the expert that has arrived.
    """
    kept: list[torch.Tensor] = []
    ranges: list[tuple[int, int]] = []
    for tensor in tensors:
        begin = tensor.data_ptr()
        end = begin + tensor.numel() * tensor.element_size()
        if not any(first <= begin and end <= last for first, last in ranges):
            kept.append(tensor)
            ranges.append((begin, end))
    return kept


def find_exchanges(old: Placement, new: Placement) -> tuple[Array, Array]:
    """Return two arrays ``int64[layers, ranks, places]``: the rank that each home receives from, and the rank it sends to."""
    assert old.homes is not None and new.homes is not None
    width = old.cluster.slots_per_rank[0]
    places = old.homes.shape[1] // old.cluster.ranks
    giver = np.empty((old.layers, old.cluster.ranks, places), np.int64)
    taker = np.empty_like(giver)
    layers = np.arange(old.layers)[:, None]
    (from_rank, from_place), (to_rank, to_place) = np.divmod(old.homes, width), np.divmod(new.homes, width)
    if (from_place != to_place).any():
        raise ValueError("a home that changes its place within a rank: homes change places with those of other ranks alone")
    giver[layers, to_rank, to_place] = from_rank
    taker[layers, from_rank, from_place] = to_rank
    return giver, taker
