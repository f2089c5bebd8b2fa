"""How the parts of a recorded action shared their rank: who computed, what was under way, and where the rank waited.

One part has the rank at a time. It computes, or it waits for what is left of a transfer of its own; that wait is exposed
communication. A transfer that is under way while either part computes is hidden. Where a record does not say when a transfer was
complete, it counts as under way until its part went on, so what is hidden is then an upper bound.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from counterflow.schedule.actions import Action
from counterflow.schedule.timeline import Span, Timeline, Turns

Interval = tuple[float, float]
# Of a single action: rank, whether it is a forward, stage, micro-batch. A record may call an I a B (`fit_record`).
Key = tuple[int, bool, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """A single action, or the F or B of a pair: intervals in order of time.

    It had the rank in ``computes`` and in ``waits``; its communications were ``under_way`` from their issue to their completion.
    """

    single: Action
    computes: tuple[Interval, ...]
    under_way: tuple[Interval, ...]
    waits: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Sharing:
    """An action with what its parts did, in the order of `Action.singles`; times add up over them."""

    span: Span
    parts: tuple[Part, ...]

    @property
    def waiting(self) -> float:
        """Time in which the rank waited for a transfer: exposed communication."""
        return _measure(self._list_waits())

    @property
    def computation(self) -> float:
        """The other time of the action: what its host needs between is part of it."""
        return self.span.end - self.span.start - self.waiting

    @property
    def hidden(self) -> float:
        """Time in which the rank computed and a transfer was under way."""
        under_way = [one for part in self.parts for one in part.under_way]
        return _measure([*under_way, *self._list_waits()]) - self.waiting

    def _list_waits(self) -> list[Interval]:
        return [one for part in self.parts for one in part.waits]


@dataclass(frozen=True, slots=True)
class PairTimes:
    """What the overlapped pairs of one rank, or of all, took together, in the timeline's unit."""

    pairs: int
    time: float
    computation: float
    hidden: float
    waiting: float


def find_sharing(timeline: Timeline) -> list[Sharing]:
    """Return the actions of which a record says how they shared their rank, in the order of the timeline's spans.

    That is pairs with turns, and actions with communications. What lies outside of its action is cut off; communications and
    turns of no action are left out.
    """
    if not timeline.communications and not timeline.turns:
        return []
    communications: dict[Key, list[tuple[float, float, float, float | None]]] = {}
    for one in timeline.communications:
        times = one.issued, one.waited, one.end, one.complete
        communications.setdefault(_find_key(one.rank, one.action), []).append(times)
    turns = {_find_key(one.rank, one.action.parts[0]): one for one in timeline.turns}
    found = []
    for span in timeline.spans:
        keys = [_find_key(span.rank, single) for single in span.action.singles()]
        changes = turns.get(keys[0]) if span.action.parts else None
        if changes is not None or any(key in communications for key in keys):
            held = _split_turns(span, changes)
            parts = [
                _make_part(span, single, one, communications.get(key, []))
                for single, one, key in zip(span.action.singles(), held, keys, strict=True)
            ]
            found.append(Sharing(span, tuple(parts)))
    return found


def sum_pairs(sharings: Iterable[Sharing]) -> PairTimes | None:
    """Return what the pairs among them took together; None where there is none."""
    pairs = [one for one in sharings if one.span.action.parts]
    if not pairs:
        return None
    return PairTimes(
        len(pairs),
        sum(one.span.end - one.span.start for one in pairs),
        sum(one.computation for one in pairs),
        sum(one.hidden for one in pairs),
        sum(one.waiting for one in pairs),
    )


def _find_key(rank: int, single: Action) -> Key:
    return rank, single.kind == "F", single.stage, single.microbatch


def _split_turns(span: Span, turns: Turns | None) -> list[list[Interval]]:
    """Return when each part had the rank; all the time where a record does not say."""
    if turns is None or not turns.starts:
        return [[(span.start, span.end)] for _ in span.action.singles()]
    # Whoever begins began with the action.
    times = [span.start, *turns.starts[1:], span.end]
    each = list(zip(times, times[1:], strict=False))
    return [each[1::2], each[::2]]


def _make_part(
    span: Span, single: Action, held: list[Interval], communications: list[tuple[float, float, float, float | None]]
) -> Part:
    waits = tuple(_merge(_cut(span, ((waited, end) for _, waited, end, _ in communications))))
    under_way = [(issued, end if complete is None else complete) for issued, _, end, complete in communications]
    computes = tuple(_subtract(list(_cut(span, held)), waits))
    return Part(single, computes, tuple(sorted(_cut(span, under_way))), waits)


def _cut(span: Span, intervals: Iterable[Interval]) -> Iterator[Interval]:
    """Yield what lies within the action."""
    for start, end in intervals:
        if (start := max(start, span.start)) < (end := min(end, span.end)):
            yield start, end


def _merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals in order, those that overlap or touch as one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _subtract(intervals: list[Interval], others: tuple[Interval, ...]) -> Iterator[Interval]:
    """Yield what is left of the intervals outside of the others; both are in order, none of them overlap."""
    number = 0
    for start, end in intervals:
        while number < len(others) and others[number][0] < end:
            if start < others[number][0]:
                yield start, others[number][0]
            start = max(start, others[number][1])
            if others[number][1] > end:
                break  # it goes on in the next interval
            number += 1
        if start < end:
            yield start, end


def _measure(intervals: Iterable[Interval]) -> float:
    """Return how much time intervals cover together."""
    return sum(end - start for start, end in _merge(intervals))
