"""What the actions of a schedule cost: the input of simulation and search."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import PAIR, Action

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch on one model chunk, a number or one per stage, in any one unit.

    ``f`` forward, ``i`` input gradient, ``w`` weight gradient; a whole backward takes i + w. ``p2p`` is the time from the end
    of an action until its result is on a neighbouring rank. ``overlap`` is the time of an overlapped pair over the sum of
    its parts (1: nothing gained). With ``p2p_overlaps`` off, a transfer holds both its ranks, between two actions; those of
    one stop move in one batch, as with Megatron's fused send and receive. ``activation_bytes`` of a chunk's forward live until
    its input gradient, ``queued_bytes`` from then until its weight gradient. Raises `ScheduleError` for what is negative, not a
    number, or out of range.
    """

    f: PerStage = 1.0
    i: PerStage = 1.0
    w: PerStage = 1.0
    p2p: float = 0.0
    overlap: float = 1.0
    p2p_overlaps: bool = True
    activation_bytes: PerStage | None = None
    queued_bytes: PerStage | None = None

    def __post_init__(self) -> None:
        for name in ("f", "i", "w", "activation_bytes", "queued_bytes"):
            given = getattr(self, name)
            for value in () if given is None else given if isinstance(given, Sequence) else (given,):
                if not (math.isfinite(value) and value >= 0):
                    raise ScheduleError(f"cost {name} {value} given; allowed are finite numbers from 0 up")
        if not (math.isfinite(self.p2p) and self.p2p >= 0):
            raise ScheduleError(f"cost p2p {self.p2p} given; allowed are finite numbers from 0 up")
        if not 0 < self.overlap <= 2:
            raise ScheduleError(f"overlap {self.overlap} given; allowed is above 0 (all hidden) to 1 (nothing gained), 2 at most")

    def spread(self, stages: int) -> "Costs":
        """Return the same costs with one number per stage; raises `ScheduleError` where the count differs."""
        spread: dict[str, Any] = {
            name: spread_over(getattr(self, name), stages, name)
            for name in ("f", "i", "w", "activation_bytes", "queued_bytes")
            if getattr(self, name) is not None
        }
        return replace(self, **spread)

    def time(self, action: Action) -> float:
        """Return how long an action takes; the costs must be spread."""
        f, i, w = self.f, self.i, self.w
        assert not (isinstance(f, float | int) or isinstance(i, float | int) or isinstance(w, float | int)), "spread first"
        stage = action.stage
        match action.kind:
            case "F":
                return f[stage]
            case "I":
                return i[stage]
            case "W":
                return w[stage]
            case "B":
                return i[stage] + w[stage]
            case kind:
                assert kind == PAIR
                back = action.parts[1].stage
                return self.overlap * (f[stage] + i[back] + w[back])


def spread_over(given: PerStage, stages: int, name: str) -> tuple[float, ...]:
    """Return one number per stage of ``given``, a number or one per stage already."""
    if not isinstance(given, Sequence):
        return (float(given),) * stages
    if len(given) != stages:
        raise ScheduleError(f"cost {name} has {len(given)} numbers; the layout has {stages} stages: give one number or {stages}")
    return tuple(map(float, given))
