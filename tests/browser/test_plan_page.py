"""The page of a plan in a real browser: its parts are drawn, lie apart, and tell what they are."""

from collections.abc import Callable
from typing import Any

import pytest

from counterflow.planner.config import parse_config
from counterflow.planner.explain import explain_step, try_changes
from counterflow.planner.search import search_layouts
from counterflow.report.plan_page import PlanView, render_plan_html

PLAN: dict[str, Any] = {
    "model": {"name": "Qwen3-30B-A3B"}, "cluster": {"gpu": "H100", "gpus": 64},
    "training": {"seq_length": 4096, "global_batch_size": 256, "precision": "bf16", "routing": "natural"},
    "layout": {"tp": 1, "pp": 4, "ep": 8, "micro_batch_size": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> str:
    found = search_layouts(parse_config(PLAN), seconds=120)
    best = found.candidates[0]
    view = PlanView(found.candidates[:4], found.pareto, explain_step(best), try_changes(best))
    return render_plan_html(view, "plan.yaml <b>")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1300), ("dark", 700)])
def test_all_parts_are_drawn_and_lie_apart(
    text: str, scheme: str, width: int, open_text: Callable[..., Any], find_overlaps: Callable[[Any], list[str]]
) -> None:
    page = open_text(text, scheme, width)
    assert page.title() == "plan.yaml <b>"
    for part in ("waterfall", "changes", "memory", "timeline", "pareto"):
        assert page.locator(f"#{part}").is_visible(), f"{part} is not there"
    assert page.locator("#layouts tbody tr").count() == 4
    assert page.locator("#memory polyline").count() == 4
    assert not find_overlaps(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "the page is wider than the window"


def test_the_bars_of_the_waterfall_begin_where_the_one_before_ends(text: str, open_text: Callable[..., Any]) -> None:
    page = open_text(text, "light", 1300)
    script = "(nodes) => nodes.map((node) => [node.getBBox().x, node.getBBox().width])"
    bars = page.locator("#waterfall rect").evaluate_all(script)
    # A bar is a pixel wide at least.
    for (before, width), (begin, _) in zip(bars, bars[1:], strict=False):
        assert abs(before + width - begin) <= 1.0


def test_a_bar_tells_its_cause_and_seconds(text: str, open_text: Callable[..., Any]) -> None:
    page = open_text(text, "light", 1300)
    page.locator("#waterfall .bar rect").first.hover()
    assert page.locator("#tooltip").inner_text().startswith("compute: ")
