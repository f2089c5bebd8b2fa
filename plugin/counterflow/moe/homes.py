"""Re-homing: experts change the rank they live on, with all that the optimizer keeps for them.

An expert keeps its place among the homes of a rank: all ranks have as much in one place, the same parameters in the same order
of the same optimizer shards, so what a rank has of an expert goes, as it is, to the rank with the same shard of the other one.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.placement import Placement

# What is to be moved of a home, and what puts it down there: (layer, place) to tensors, (layer, place, tensors) to nothing.
Take = Callable[[int, int], list[torch.Tensor]]
Put = Callable[[int, int, list[torch.Tensor]], None]


def move_homes(old: Placement, new: Placement, group: dist.ProcessGroup, take: Take, put: Put) -> int:
    """Move every home that ``new`` has on another rank than ``old``; return how many, over all ranks of ``group``.

    One expert of a rank is under way at a time, so that it takes no more room than one. Every rank calls this with the same
    placements, whose homes differ by exchanges between ranks alone (`plan_homes`).
    """
    rank, peers = group.rank(), dist.get_process_group_ranks(group)
    giver, taker = find_exchanges(old, new)
    for layer, place in np.argwhere(giver[:, rank] != rank).tolist():
        tensors = take(layer, place)
        arrived = [torch.empty_like(tensor) for tensor in tensors]
        operations = []
        for tag, (tensor, buffer) in enumerate(zip(tensors, arrived, strict=True)):
            operations.append(dist.P2POp(dist.isend, tensor.detach(), peers[taker[layer, rank, place]], group, tag))
            operations.append(dist.P2POp(dist.irecv, buffer, peers[giver[layer, rank, place]], group, tag))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        put(layer, place, arrived)
    return int((giver != np.arange(len(peers))[:, None]).sum())


def find_exchanges(old: Placement, new: Placement) -> tuple[Array, Array]:
    """Return ``int64[layers, ranks, places]`` twice: the rank that a home's next expert comes from, and that its last goes to."""
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
