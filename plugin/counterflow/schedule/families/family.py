"""What a schedule family says of itself: everything that the rest of the project needs to know of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from counterflow.schedule.layouts import BIDIRECTIONAL
from counterflow.schedule.table import ScheduleTable


@dataclass(frozen=True)
class Family:
    """A schedule that is built by name.

    ``build(ranks, microbatches)`` returns its table and raises `ScheduleError` for sizes that it does not allow; it may take
    ``vpp`` (chunks per rank), ``group`` and ``ep_overlap`` besides. ``layout`` is the name of a layout. ``splits``: its tables
    have I and W. ``pairs``: they have overlapped pairs, with ``ep_overlap`` where the family takes that. The others are words
    for readers: the sizes that it allows, its bubble per rank and its live activations, where both come from, and the smallest
    table that explains it, a line per rank.
    """

    name: str
    build: Callable[..., ScheduleTable]
    layout: str
    splits: bool
    pairs: bool
    sizes: str
    bubble: str
    activations: str
    source: str
    picture: str

    @cached_property
    def options(self) -> tuple[str, ...]:
        """What ``build`` takes besides ranks and micro-batches."""
        return tuple(inspect.signature(self.build).parameters)[2:]

    @property
    def replicas(self) -> int:
        """How many data-parallel replicas of a model a table spans: two where micro-batches flow in both directions."""
        return 2 if self.layout == BIDIRECTIONAL else 1
