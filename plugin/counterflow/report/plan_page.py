"""The page of a plan: where a step goes, memory over time, the timeline, time against memory, what would change it."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from counterflow.errors import CounterflowError
from counterflow.planner.against import Comparison
from counterflow.planner.estimate import Estimate
from counterflow.planner.explain import Bar, Change
from counterflow.planner.layouts import build_table
from counterflow.planner.searched import Searched
from counterflow.planner.step import cut_microbatches
from counterflow.report.filling import fill_page
from counterflow.report.picture import Picture, clean_text
from counterflow.report.plan_text import HEADINGS, list_compared, list_row, write_change
from counterflow.report.svg import render_svg
from counterflow.schedule import ScheduleTable, Timeline, simulate

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 260, 70, 34, 14
ROW = 26
# A page with more blocks is slow; its timeline shows the first micro-batches of a long step.
MOST_ACTIONS = 6000
MOST_POINTS = 400
MOST_RANKS = 8


@dataclass(frozen=True)
class PlanView:
    """What a page shows: estimates, best first; the pareto front; the first one's waterfall, changes and searched table."""

    estimates: tuple[Estimate, ...]
    pareto: tuple[Estimate, ...] = ()
    bars: Sequence[Bar] = ()
    changes: Sequence[Change] = ()
    searched: Searched | None = None
    compared: Comparison | None = None


def render_plan_html(view: PlanView, title: str) -> str:
    """Return one self-contained page."""
    first = view.estimates[0]
    bars = view.bars or [Bar(name, seconds) for name, seconds in first.step.causes.items()]
    table, timeline, note = run_first(view)
    try:
        drawn = render_svg([Picture(clean_text(f"{first.plan.layout.schedule}"), table, timeline)])
    except CounterflowError:
        drawn = ""
    return fill_page(
        "plan",
        "plan",
        {},
        title=clean_text(title),
        headings=HEADINGS,
        rows=[list_row(one, place, place == 1 and view.searched is not None) for place, one in enumerate(view.estimates, 1)],
        step=f"{first.step_s:.3g} s ({first.low:.3g} to {first.high:.3g})",
        compared=[] if view.compared is None else list_compared(view.compared),
        compared_notes=() if view.compared is None else view.compared.remarks,
        notes=[clean_text(text) for text in first.plan.notes],
        waterfall=Markup(draw_waterfall(bars, first.step_s)),
        memory=Markup(draw_memory(first, timeline)),
        timeline=Markup(drawn.partition("?>")[2] if drawn.startswith("<?xml") else drawn),
        timeline_note=note,
        pareto=Markup(draw_pareto(view)) if view.pareto else "",
        changes=[
            (one.words, "" if one.seconds is None else f"{one.seconds:.3g} s",
             "" if one.seconds is None else write_change(one.seconds / first.step_s))
            for one in view.changes
        ],
    )  # fmt: skip


def run_first(view: PlanView) -> tuple[ScheduleTable, Timeline, str]:
    """Return the first estimate's table, or the beginning of a long one, with its simulation, and what is left out."""
    first = view.estimates[0]
    if view.searched is not None:
        return view.searched.table, view.searched.timeline, ""
    layout, count = first.plan.layout, first.plan.microbatches
    shown = count
    if 2 * layout.stages * count > MOST_ACTIONS:
        shown = min(cut_microbatches(layout, count), count)
    table = build_table(layout, shown)
    note = "" if shown == count else f"{shown} of {count} micro-batches: the rest repeats"
    return table, simulate(table, replace(first.step.costs, reduce=0.0)), note


def draw_waterfall(bars: Sequence[Bar], seconds: float) -> str:
    """Return an SVG of bars, each beginning where the one before ends."""
    height = ROW * (len(bars) + 1) + 8
    scale = (WIDTH - 250) / max(seconds, 1e-12)
    lines, place = [], 0.0
    for number, bar in enumerate(bars):
        begin, end = sorted((place, place + bar.seconds))
        top, place = 4 + ROW * number, place + bar.seconds
        words = f"{html.escape(bar.cause)}: {bar.seconds:.3f} s"
        lines.append(
            f'<g class="bar"><title>{words}</title><text x="150" y="{top + 16}" text-anchor="end">{html.escape(bar.cause)}</text>'
            f'<rect class="{"saved" if bar.seconds < 0 else choose_class(bar.cause)}" x="{160 + scale * begin:.1f}" y="{top}" '
            f'width="{max(scale * (end - begin), 1):.1f}" height="20"/>'
            f'<text x="{166 + scale * end:.1f}" y="{top + 16}">{bar.seconds:.3g} s</text></g>'
        )
    return _open(WIDTH, height, "waterfall of a step") + "".join(lines) + "</svg>"


def choose_class(cause: str) -> str:
    """Return the kind of a cause: computing, communicating, waiting."""
    if cause in ("compute", "optimizer"):
        return "computing"
    return "waiting" if cause in ("bubble", "host", "host and rest", "imbalance") else "communicating"


def draw_memory(estimate: Estimate, timeline: Timeline) -> str:
    """Return an SVG of each rank's memory over time, the card's size as a line."""
    card = estimate.setting.cluster.memory_gib
    rows = [[(time, size / 2**30) for time, size in row] for row in estimate.memory.follow(timeline)]
    most = max(card, max(size for row in rows for _, size in row))
    end = max(timeline.makespan, 1e-12)
    lines = []
    shown = list(enumerate(rows))[:: max(1, -(-len(rows) // MOST_RANKS))]
    for place, (rank, row) in enumerate(shown):
        points = " ".join(f"{_x(time / end):.1f},{_y(size / most):.1f}" for time, size in _thin(row))
        lines.append(
            f'<polyline class="line s{place}" points="{points}">'
            f"<title>rank {rank}: at most {max(s for _, s in row):.1f} GiB</title></polyline>"
        )
    level = _y(card / most)
    lines.append(f'<line class="card" x1="{LEFT}" x2="{WIDTH - 10}" y1="{level:.1f}" y2="{level:.1f}"/>')
    lines.append(f'<text x="{WIDTH - 12}" y="{level + 14:.1f}" text-anchor="end">card: {card:.1f} GiB</text>')
    return _open(WIDTH, HEIGHT, "memory over time by rank") + _axes(end, most, "s", "GiB") + "".join(lines) + "</svg>"


def _thin(row: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the highest point of each stretch."""
    stretch = max(1, -(-len(row) // MOST_POINTS))
    for start in range(0, len(row), stretch):
        yield max(row[start : start + stretch], key=lambda point: point[1])


def draw_pareto(view: PlanView) -> str:
    """Return an SVG of step time against memory: estimates as points, the front as a line."""
    points = [(one.step_s, max(one.memory.per_rank), one) for one in (*view.pareto, *view.estimates)]
    slowest, most = 1.05 * max(x for x, _, _ in points), 1.05 * max(y for _, y, _ in points)
    front = " ".join(f"{_x(one.step_s / slowest):.1f},{_y(max(one.memory.per_rank) / most):.1f}" for one in view.pareto)
    dots = "".join(
        f'<circle class="dot" cx="{_x(x / slowest):.1f}" cy="{_y(y / most):.1f}" r="4"><title>'
        f"{html.escape(' '.join(list_row(one, 0)[1:4]))}, {y:.1f} GiB</title></circle>"
        for x, y, one in points
    )
    frame = _open(WIDTH, HEIGHT, "step time against memory") + _axes(slowest, most, "s a step", "GiB")
    return f'{frame}<polyline class="line s0" points="{front}"/>{dots}</svg>'


def _open(width: int, height: int, words: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}" class="drawing">'


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - 10)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _axes(end: float, most: float, unit: str, other: str) -> str:
    lines = []
    for part in range(5):
        share = part / 4
        lines.append(f'<text x="{_x(share):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{share * end:.3g} {unit}</text>')
        lines.append(f'<text x="{LEFT - 6}" y="{_y(share) + 4:.1f}" text-anchor="end">{share * most:.3g} {other}</text>')
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>')
    return "".join(lines)
