"""Sets of time as sorted, disjoint intervals, in integer nanoseconds."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array


@dataclass(frozen=True)
class Union:
    """A union of intervals: ``starts`` and ``ends`` int64[n] in order of time, each interval apart from the next."""

    starts: Array
    ends: Array

    @property
    def length(self) -> int:
        """Its measure."""
        return int((self.ends - self.starts).sum())

    def cover(self, times: Array) -> Array:
        """Return how much of the union lies before each time, int64 of any shape."""
        if not len(self.starts):
            return np.zeros_like(times)
        before = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        place = np.searchsorted(self.starts, times, side="right") - 1
        inside = np.minimum(times, self.ends[place]) - self.starts[place]
        return np.where(place < 0, 0, before[place] + inside)

    def overlap(self, starts: Array, ends: Array) -> Array:
        """Return how much of each interval the union covers."""
        return self.cover(ends) - self.cover(starts)

    def intersect(self, other: "Union") -> int:
        """Return the measure of what is in both."""
        return int(self.overlap(other.starts, other.ends).sum())


def unite(starts: Array, ends: Array) -> Union:
    """Return the union of intervals in any order, overlapping or not."""
    if not len(starts):
        return Union(starts.astype(np.int64), ends.astype(np.int64))
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.concatenate([[True], starts[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return Union(starts[first], reach[last])


def claim(starts: Array, ends: Array) -> tuple[Array, Array]:
    """Share out the union of intervals: each gets the part in which none that ends later runs, as (starts, ends).

    Parts are disjoint and add up to the union; where nothing is left for an interval its part is empty. Of several that end at
    one time the first to start gets all.
    """
    order = np.lexsort((starts, -ends))
    bounds = np.concatenate([ends[order][:1], np.minimum.accumulate(starts[order])[:-1]])
    upto = np.empty_like(ends)
    upto[order] = np.minimum(ends[order], bounds)
    return np.minimum(starts, upto), upto


def subtract(union: Union, other: Union) -> Union:
    """Return what is in a union and not in another."""
    return _combine(union, other, wanted=0)


def intersect(union: Union, other: Union) -> Union:
    """Return what is in both unions."""
    return _combine(union, other, wanted=1)


def _combine(union: Union, other: Union, wanted: int) -> Union:
    """Return what is in a union where the other counts ``wanted``."""
    sizes = [len(union.starts)] * 2 + [len(other.starts)] * 2
    times = np.concatenate([union.starts, union.ends, other.starts, other.ends])
    order = np.argsort(times, kind="stable")
    inside = np.cumsum(np.repeat([1, -1, 0, 0], sizes)[order])
    covered = np.cumsum(np.repeat([0, 0, 1, -1], sizes)[order])
    times = times[order]
    kept = np.flatnonzero((inside[:-1] == 1) & (covered[:-1] == wanted) & (times[1:] > times[:-1]))
    return unite(times[:-1][kept], times[1:][kept])
