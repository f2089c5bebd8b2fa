"""What the families share: rows of actions under construction."""

from collections import deque

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, pair


class Row:
    """One rank's row under construction: counts each stage's micro-batches, queues split W's.

    ``first`` is the first micro-batch of a stage where it is not 0.
    """

    def __init__(self, first: dict[int, int] | None = None) -> None:
        self.actions: list[Action] = []
        self._first = first or {}
        self._next: dict[tuple[str, int], int] = {}
        self._weights: deque[Action] = deque()

    def take(self, kind: str, stage: int) -> Action:
        """Return the F or B of the stage's next micro-batch."""
        microbatch = self._next.get((kind, stage), self._first.get(stage, 0))
        self._next[kind, stage] = microbatch + 1
        return Action(kind, stage, microbatch)

    def forward(self, stage: int) -> None:
        """Append the stage's next F."""
        self.actions.append(self.take("F", stage))

    def backward(self, stage: int, split: bool = False) -> None:
        """Append the stage's next B; split, its I, and queue its W."""
        whole = self.take("B", stage)
        if split:
            self._weights.append(Action("W", stage, whole.microbatch))
            whole = Action("I", stage, whole.microbatch)
        self.actions.append(whole)

    def weight(self) -> None:
        """Append the W that has been queued longest."""
        self.actions.append(self._weights.popleft())

    def overlap(self, forward_stage: int, backward_stage: int) -> None:
        """Append the overlapped pair of the stages' next F and next B."""
        self.actions.append(pair(self.take("F", forward_stage), self.take("B", backward_stage)))


def require(fits: bool, name: str, ranks: int, microbatches: int, allowed: str) -> None:
    """Raise `ScheduleError` that says what was given and what the family needs."""
    if not fits:
        raise ScheduleError(f"{name}: {microbatches} micro-batches on {ranks} ranks given; it needs {allowed}")
