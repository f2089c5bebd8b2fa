"""How long a message takes between two ranks of a pipeline, from when their actions ran."""

from collections.abc import Sequence

from counterflow.schedule.dependencies import Result, find_input, find_result
from counterflow.schedule.timeline import Span


def measure_transfer(spans: Sequence[Span]) -> float:
    """Return the mean time from the end of an action to the start of one on another rank that was free and waited for it.

    0 where nothing waited. Clocks that differ between ranks make some of these times longer and some shorter.
    """
    last_stage = max((single.stage for span in spans for single in span.action.singles()), default=0)
    made: dict[Result, Span] = {}
    for span in spans:
        for single in span.action.singles():
            if (result := find_result(single)) is not None:
                made[result] = span
    free: dict[int, float] = {}
    times = []
    for span in sorted(spans, key=lambda span: span.start):
        needs = (find_input(single, last_stage) for single in span.action.singles())
        sources = [made[need] for need in needs if need is not None and need in made]
        source = max(sources, key=lambda source: source.end, default=None)
        if source is not None and source.rank != span.rank and source.end > free.get(span.rank, float("-inf")):
            times.append(span.start - source.end)
        free[span.rank] = max(span.end, free.get(span.rank, span.end))
    return sum(times) / len(times) if times else 0.0
