"""A static picture of a balance replay or a recorded run for papers: balancedness by layer, heat maps, bars; text as text."""

import textwrap

from counterflow.report.balance_figures import Balancing, Grouping, group_steps
from counterflow.report.colours import LIGHT
from counterflow.report.picture import clean_text
from counterflow.report.plots import (
    AXIS,
    BARS,
    BOLD,
    CHART,
    COLUMNS,
    GAP,
    LEAST_MAP,
    LEFT,
    LINE,
    MARGIN,
    MOST_MAP,
    ORDER,
    ROW,
    WIDTH,
    Box,
    Part,
    draw_bars,
    draw_legend,
    draw_levels,
    draw_map,
    draw_method,
    draw_row,
    draw_scale,
    draw_steps,
    draw_stroke,
    stack_parts,
)
from counterflow.report.shapes import draw_text

# What bounds the picture: layers drawn, groups of micro-batches or steps in a plot, cells of a heat map; characters of a line.
MAX_LAYERS, MAX_GROUPS, MAX_CELLS = 12, 360, 40_000
CHARACTERS = 165


def render_picture(view: Balancing, title: str) -> str:
    """Return an SVG document, its size bounded; it says what it leaves out. Its tables count everything."""
    grouping = group_steps(len(view.numbers), min(MAX_GROUPS, MAX_CELLS // view.rows))
    places = sorted(view.find_lowest(MAX_LAYERS))
    return stack_parts(
        [
            _draw_head(view, title, view.list_notes(len(places), grouping)),
            _draw_charts(view, places, grouping),
            _draw_maps(view, grouping),
            _draw_bars(view, grouping),
        ]
    )


def _draw_head(view: Balancing, title: str, notes: list[str]) -> Part:
    """Title, the tables of figures, the first's rows the legend of the lines, and what is not shown."""
    yield draw_text(MARGIN, 24, clean_text(title), LIGHT["ink"], "start", f' font-size="14"{BOLD}')
    yield draw_text(MARGIN, 40, view.size, LIGHT["muted"], "start")
    yield from draw_row(62, ("balancedness", "mean", "5th percentile", "worst"), (MARGIN, 200, 290, 350), "muted")
    for n, (name, cells) in enumerate(view.summarise().items(), start=1):
        yield draw_stroke(f"M{MARGIN:g} {62 + n * LINE - 3.5:g}h24", name)
        yield from draw_row(62 + n * LINE, cells, (MARGIN + 30, 200, 290, 350), "ink")
    table = [(f"of each {view.unit}", "mean", "most", "in all"), *view.table] if view.table else []
    for n, row in enumerate(table):
        yield from draw_row(62 + n * LINE, row, (470, 680, 760, 850), "ink" if n else "muted")
    y = 62 + max(len(view.scores), len(view.table)) * LINE + 6
    for line in (line for note in notes for line in textwrap.wrap(note, CHARACTERS)):
        y += LINE
        yield draw_text(MARGIN, y, line, LIGHT["muted"], "start")
    yield y + 10


def _divide(columns: int) -> tuple[float, float]:
    """Return from where to where plots beside each other lie, and how wide each is."""
    share = (WIDTH - 2 * MARGIN + GAP) / columns
    return share, share - GAP - LEFT


def _draw_charts(view: Balancing, places: list[int], grouping: Grouping) -> Part:
    """A chart a layer, all with the same axes."""
    floor = view.choose_floor()
    yield draw_text(MARGIN, 14, f"Balancedness over {view.units}", LIGHT["ink"], "start", BOLD)
    columns = 2 if len(places) == 4 else min(COLUMNS, len(places))
    share, width = _divide(columns)
    for n, place in enumerate(places):
        row, column = divmod(n, columns)
        top = 36 + row * (CHART + AXIS + 22)
        box = Box(MARGIN + LEFT + column * share, top, width, CHART, view.numbers)
        yield draw_text(box.left, top - 6, f"layer {view.labels[place]}", LIGHT["ink"], "start")
        yield from draw_levels(box, floor, 1.0, 4)
        yield from draw_steps(box)
        for name in (name for name in ORDER if name in view.scores):
            yield from draw_method(box, name, view.scores[name][:, place], grouping, floor)
    yield 36 + -(-len(places) // columns) * (CHART + AXIS + 22)


def _draw_maps(view: Balancing, grouping: Grouping) -> Part:
    """The heat maps of the least balanced layer, side by side."""
    (place,) = view.find_lowest(1)
    which = f"layer {view.labels[place]}" + (f", the least balanced {view.where}" if len(view.labels) > 1 else "")
    yield draw_text(MARGIN, 14, f"{view.row.title()}s by {view.unit}: {which}", LIGHT["ink"], "start", BOLD)
    height = min(max(ROW * view.rows, LEAST_MAP), MOST_MAP)
    maps = view.make_maps([place], grouping)
    share, width = _divide(len(maps))
    for n, each in enumerate(maps):
        box = Box(MARGIN + LEFT + n * share, 84, width, height, view.numbers)
        yield draw_text(box.left, 34, each.caption, LIGHT["ink"], "start")
        yield from draw_scale(box.left, 42, each.scale)
        yield from draw_map(box, each.values[0], each.scale, grouping)
        yield from draw_steps(box)
    yield 84 + height + AXIS + 10


def _draw_bars(view: Balancing, grouping: Grouping) -> Part:
    """Bars of what was sent and of times, side by side."""
    yield draw_text(MARGIN, 14, view.heading, LIGHT["ink"], "start", BOLD)
    share, width = _divide(len(view.bars))
    for n, chart in enumerate(view.bars):
        box = Box(MARGIN + LEFT + n * share, 83, width, BARS, view.numbers)
        yield draw_text(box.left, 30, chart.note if chart.drawn else chart.nothing, LIGHT["muted"], "start")
        if chart.drawn:
            drawn = [series for series in chart.series if series.colour]
            for row, series in enumerate(drawn):
                yield from draw_legend(box.left, 39 + row * LINE, series.colour, series.legend)
            yield from draw_bars(box, drawn, grouping, f" per {view.unit}" if grouping.size > 1 else "")
    yield (83 + BARS if any(chart.drawn for chart in view.bars) else 8) + AXIS
