"""Costs of actions keep the time that the actions took, whatever held some of them up."""

from random import Random

import pytest

from counterflow.analysis.chunks import estimate_spans
from counterflow.schedule import Costs, Span, build


def time_actions(name: str, seed: int) -> list[Span]:
    """Return the actions of a rank each after the other, one in ten held up for long."""
    random, spans = Random(seed), []
    for rank, row in enumerate(build(name, 2, 6).actions):
        now = 0.0
        for action in row:
            length = sum({"F": 2.0, "I": 3.0, "W": 1.0, "B": 4.0}[one.kind] for one in action.singles())
            end = now + length * random.uniform(1.0, 1.2) * (8.0 if random.random() < 0.1 else 1.0)
            spans.append(Span(rank, action, now, end))
            now = end
    return spans


def cut_pairs(spans: list[Span]) -> list[Span]:
    """Return the spans with each pair's parts one after the other, as a run without overlap has them."""
    cut = []
    for span in spans:
        singles = list(span.action.singles())
        each = (span.end - span.start) / len(singles)
        cut += [Span(span.rank, one, span.start + k * each, span.start + (k + 1) * each) for k, one in enumerate(singles)]
    return cut


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("name", "has_pairs"), [("1f1b", False), ("zbv", False), ("dualpipev", True), ("dualpipev", False)])
def test_at_their_costs_actions_take_as_long_as_they_took(name: str, has_pairs: bool, seed: int) -> None:
    spans = time_actions(name, seed)
    spans = spans if has_pairs else cut_pairs(spans)
    found = estimate_spans(spans, "", 1.0)
    costs = Costs(found["f"], found["i"], found["w"], overlap=found["overlap"]).spread(len(found["f"]))
    assert sum(costs.time(span.action) for span in spans) == pytest.approx(sum(span.end - span.start for span in spans), rel=1e-6)


def test_a_scale_is_of_times_alone() -> None:
    spans = time_actions("dualpipev", 3)
    one, thousand = (estimate_spans(spans, "", scale) for scale in (1.0, 1e3))
    assert one["overlap"] == thousand["overlap"] and one["overlap"] != 1
    for key in "fiw":
        assert [1e3 * value for value in one[key]] == pytest.approx(thousand[key], rel=1e-6)
