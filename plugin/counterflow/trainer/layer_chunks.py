"""The model chunks of one rank, where a model is a list of layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from counterflow.schedule.layouts import Layout
from counterflow.sections import Chosen


@dataclass
class Chunks:
    """The model chunks of one rank: chunk c is the stage ``layout.stages[rank][c]`` of the model."""

    chosen: Chosen
    layout: Layout
    rank: int
    bounds: list[tuple[int, int]]
    """The layers of each chunk, from and up to."""
    functions: list[list[Callable[..., Any]]] = field(default_factory=list)
    """What each chunk runs."""
    recomputed: list[list[bool]] = field(default_factory=list)
    """Of each chunk, which groups of layers activation checkpointing recomputes."""

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages on this rank."""
        return self.layout.stages[self.rank]

    def holds(self, stage: int) -> bool:
        """Tell whether the stage is on this rank."""
        return stage in self.stages
