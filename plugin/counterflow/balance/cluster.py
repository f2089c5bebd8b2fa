"""A cluster: expert-parallel ranks with slots for experts, on nodes."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from counterflow.arrays import Array
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

# Far above any cluster's; a mistyped number must not fill the memory.
MAX_SLOTS = 2**20


@dataclass(frozen=True)
class Cluster:
    """Expert-parallel ranks: the number of slots and the node of each.

    Slots are numbered rank by rank, beginning with those of rank 0. Nodes are numbered from 0 without a gap.
    """

    slots_per_rank: tuple[int, ...]
    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.slots_per_rank or min(self.slots_per_rank) < 1:
            raise BalanceError(f"slots per rank {list(self.slots_per_rank)}; allowed: one rank or more, each with a slot or more")
        if len(self.node_of_rank) != self.ranks or set(self.node_of_rank) != set(range(max(self.node_of_rank) + 1)):
            raise BalanceError(
                f"nodes of ranks {list(self.node_of_rank)} for {self.ranks} ranks; "
                "allowed: one node per rank, numbered from 0 without a gap"
            )
        _check_slots(self.slots)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.slots_per_rank)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of_rank) + 1

    @cached_property
    def slots(self) -> int:
        """Number of slots in all."""
        return sum(self.slots_per_rank)

    @cached_property
    def nodes_of_ranks(self) -> Array:
        """``int64[ranks]``: the node of each."""
        return np.array(self.node_of_rank)

    @cached_property
    def rank_of_slot(self) -> Array:
        """``int64[slots]``."""
        return np.repeat(np.arange(self.ranks), self.slots_per_rank)

    @cached_property
    def rank_start(self) -> Array:
        """``int64[ranks + 1]``: the first slot of each rank, and the number of slots."""
        return np.cumsum((0, *self.slots_per_rank))

    @cached_property
    def node_of_slot(self) -> Array:
        """``int64[slots]``."""
        return self.nodes_of_ranks[self.rank_of_slot]


def make_cluster(ranks: int, slots: int, nodes: int = 1) -> Cluster:
    """Return a cluster of equal ranks on equal nodes, in order.

    Raises `BalanceError` where slots do not divide by ranks or ranks by nodes, or are more than 2**20.
    """
    sizes = {"ranks": ranks, "slots": slots, "nodes": nodes}
    ranks, slots, nodes = (take_whole(size, name, 1, error=BalanceError) for name, size in sizes.items())
    _check_slots(slots)
    if slots % ranks:
        raise BalanceError(
            f"{slots} slots on {ranks} ranks; allowed: a multiple of {ranks}, such as {-(-slots // ranks) * ranks}"
        )
    if ranks % nodes:
        raise BalanceError(f"{ranks} ranks on {nodes} nodes; allowed: a number of nodes that divides {ranks}")
    return Cluster((slots // ranks,) * ranks, tuple(rank * nodes // ranks for rank in range(ranks)))


def _check_slots(slots: int) -> None:
    if slots > MAX_SLOTS:
        raise BalanceError(f"{slots} slots; allowed: {MAX_SLOTS} at most, those of all ranks together")
