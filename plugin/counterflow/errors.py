"""Errors a user reads. Each message is one line: what was given, what is allowed, what to change."""

from collections.abc import Mapping


class CounterflowError(ValueError):
    """Base of every error that counterflow raises on purpose."""


class OptionError(CounterflowError):
    """An option, a flag or a combination of flags that cannot work."""


class ScheduleError(CounterflowError):
    """A schedule table that cannot run; names rank, position and action, the first two also in ``place`` where known."""

    def __init__(self, message: str, place: tuple[int, int | None] | None = None) -> None:
        super().__init__(message)
        self.place = place


class SeamError(CounterflowError):
    """An upstream symbol is missing or does not have the shape that a seam expects."""


class PipelineError(CounterflowError):
    """A training step that could not go on: names the rank, its action, what it waited for, and where that comes from."""


class BalanceError(CounterflowError):
    """Loads, slots, a placement or a trace that the balancer cannot work with."""


class TraceError(CounterflowError):
    """A profiler trace that cannot be read or analysed."""


class PlanError(CounterflowError):
    """A plan's model, cluster, layout or costs that cannot work, or a file of them that cannot be read."""


def refuse_first(reasons: Mapping[str, bool]) -> None:
    """Raise `OptionError` with the first of the reasons that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise OptionError(reason)
