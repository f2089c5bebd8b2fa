"""A schedule as data: for each pipeline rank, the list of its actions."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from counterflow.schedule.actions import Action
from counterflow.schedule.layouts import Layout


@dataclass(frozen=True)
class ScheduleTable:
    """A schedule of ``microbatches`` over a layout; ``actions[rank]`` runs from left to right.

    Tables are equal where layout, micro-batches and actions are, whatever their names.
    """

    name: str = field(compare=False)
    layout: Layout
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Return the rank that computes a stage for a micro-batch: of two homes the first for the first half of them."""
        homes = self.layout.homes[stage]
        return homes[0] if len(homes) == 1 or microbatch < self.microbatches // 2 else homes[1]

    @cached_property
    def digest(self) -> int:
        """A 63-bit hash of the actions: equal tables have equal digests on every machine."""
        text = "\n".join(",".join(map(str, row)) for row in self.actions)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    @cached_property
    def is_forward_only(self) -> bool:
        """Whether the table has forwards alone: it evaluates a model, and trains nothing."""
        return all(single.kind == "F" for rank in range(self.ranks) for single in self.singles(rank))

    def singles(self, rank: int) -> Iterator[Action]:
        """Yield the rank's F, I, W, B and R actions in order, overlapped pairs taken apart."""
        for action in self.actions[rank]:
            yield from action.singles()

    def __str__(self) -> str:
        head = f"{self.name}: {self.ranks} ranks, {self.microbatches} micro-batches, {self.layout.name} layout"
        rows = (f"  rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.actions))
        return "\n".join([head, *rows])
