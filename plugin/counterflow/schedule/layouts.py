"""Which pipeline rank holds which stages.

    straight, 4 ranks      looped, 2 ranks x 2      V, 2 ranks
    rank 0: 0              rank 0: 0 2              rank 0: 0 3
    rank 1: 1              rank 1: 1 3              rank 1: 1 2
    rank 2: 2
    rank 3: 3

In a V the model turns on the last rank, which holds two neighbouring stages, and ends where it began.
"""

from dataclasses import dataclass
from functools import cached_property

STRAIGHT, LOOPED, V = "straight", "looped", "v"


@dataclass(frozen=True)
class Layout:
    """``stages[rank]`` lists the stages of that rank, one per model chunk, in forward order."""

    name: str
    stages: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.stages)

    @property
    def chunks(self) -> int:
        """Number of model chunks on each rank."""
        return len(self.stages[0])

    @property
    def last_stage(self) -> int:
        """The stage that computes the loss."""
        return self.ranks * self.chunks - 1

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The rank of each stage."""
        return {stage: rank for rank, held in enumerate(self.stages) for stage in held}

    def chunk_of(self, stage: int) -> int:
        """Return the index of the model chunk that is this stage on its rank."""
        return self.stages[self.rank_of[stage]].index(stage)


def lay_straight(ranks: int) -> Layout:
    """One stage a rank."""
    return Layout(STRAIGHT, tuple((rank,) for rank in range(ranks)))


def lay_looped(ranks: int, chunks: int) -> Layout:
    """``chunks`` stages a rank, dealt round by round (Megatron's virtual pipeline)."""
    return Layout(LOOPED, tuple(tuple(range(rank, ranks * chunks, ranks)) for rank in range(ranks)))


def lay_v(ranks: int) -> Layout:
    """Two stages a rank: the way there and the way back."""
    return Layout(V, tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks)))


def find_layout(stages: tuple[tuple[int, ...], ...]) -> Layout | None:
    """Return the straight, looped or V layout that has these stages on its ranks, if one has."""
    ranks, chunks = len(stages), len(stages[0]) if stages else 0
    candidates = [lay_straight(ranks)] if chunks == 1 else [lay_v(ranks), lay_looped(ranks, chunks)]
    return next((layout for layout in candidates if layout.stages == stages), None)
