"""What the actions of a schedule cost: the input of simulation and search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from counterflow.bounds import show, take_number
from counterflow.errors import ScheduleError
from counterflow.schedule.actions import PAIR, Action

PerStage = float | Sequence[float]
# In any unit that is of use, and such that neither their sums nor their quotients overflow.
SMALLEST_COST, LARGEST_COST = 1e-30, 1e30
# As good as hidden: a pair that takes no time at all would leave nothing to divide by.
LEAST_OVERLAP, MOST_OVERLAP = 1e-6, 2.0


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch on one model chunk, a number or one per stage, in any one unit.

    ``f`` forward, ``i`` input gradient, ``w`` weight gradient; a whole backward takes i + w. ``p2p`` is the time from the end
    of an action until its result is on a neighbouring rank. ``overlap`` is the time of an overlapped pair over the sum of
    its parts (1: nothing gained). With ``p2p_overlaps`` off, a transfer holds both its ranks, between two actions; those of
    one stop move in one batch, as with Megatron's fused send and receive. ``activation_bytes`` of a chunk's forward live until
    its input gradient, ``queued_bytes`` from then until its weight gradient. ``reduce`` is the time of a chunk's gradient
    reduction, once a step. Each is 0 or from 1e-30 to 1e30. Raises `ScheduleError` for what is not a number or out of range.
    """

    f: PerStage = 1.0
    i: PerStage = 1.0
    w: PerStage = 1.0
    p2p: float = 0.0
    overlap: float = 1.0
    p2p_overlaps: bool = True
    activation_bytes: PerStage | None = None
    queued_bytes: PerStage | None = None
    reduce: PerStage = 0.0

    def __post_init__(self) -> None:
        for name in ("f", "i", "w", "p2p", "reduce", "activation_bytes", "queued_bytes"):
            value = getattr(self, name)
            if hasattr(value, "tolist"):  # an array or a number of numpy's
                object.__setattr__(self, name, value := value.tolist())
            if value is not None or not name.endswith("bytes"):
                _check_cost(name, value)
        take_number(self.overlap, "overlap", LEAST_OVERLAP, MOST_OVERLAP, ScheduleError)

    def spread(self, stages: int) -> "Costs":
        """Return the same costs with one number per stage; raises `ScheduleError` where the count differs."""
        spread: dict[str, Any] = {
            name: spread_over(getattr(self, name), stages, name)
            for name in ("f", "i", "w", "reduce", "activation_bytes", "queued_bytes")
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


def _check_cost(name: str, cost: Any) -> None:
    """Raise `ScheduleError` for what is no number, or no row of numbers, of a size that can be computed with."""
    several = isinstance(cost, Sequence) and not isinstance(cost, str | bytes) and name != "p2p"
    for value in cost if several else (cost,):
        number = take_number(value, f"cost {name}", 0.0, LARGEST_COST, ScheduleError)
        if 0 < number < SMALLEST_COST:
            raise ScheduleError(f"cost {name} {show(value)} given; allowed: 0, or {SMALLEST_COST:g} to {LARGEST_COST:g}")


def spread_over(cost: PerStage, stages: int, name: str) -> tuple[float, ...]:
    """Return one number per stage of ``given``, a number or one per stage already."""
    if not isinstance(cost, Sequence):
        return (float(cost),) * stages
    if len(cost) != stages:
        raise ScheduleError(f"cost {name} has {len(cost)} numbers; the layout has {stages} stages: give one number or {stages}")
    return tuple(map(float, cost))
