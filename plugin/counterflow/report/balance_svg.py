"""A static picture of a balance replay or a recorded run for papers: balancedness by layer, heat maps, bars; text as text."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from counterflow.arrays import Array
from counterflow.report.balance_figures import Balancing, Grouping, Scale, Series, group_steps
from counterflow.report.colours import LIGHT
from counterflow.report.picture import choose_step, clean_text, write_number
from counterflow.report.shapes import draw_line, draw_rectangle, draw_text, open_document

# What bounds the picture: layers drawn, groups of micro-batches or steps in a plot, cells of a heat map; characters of a line.
MAX_LAYERS, MAX_GROUPS, MAX_CELLS = 12, 360, 40_000
CHARACTERS = 165
# Pixels at the default size.
WIDTH, MARGIN, LEFT, GAP, AXIS, LINE = 900.0, 14.0, 34.0, 18.0, 28.0, 15.0
CHART, COLUMNS, ROW, LEAST_MAP, MOST_MAP, BARS = 92.0, 3, 11.0, 44.0, 264.0, 80.0
# The last is drawn on top.
ORDER = ("fixed", "eplb", "oracle", "counterflow")
BOLD = ' font-weight="bold"'

# Elements of a part of the picture, drawn from 0 on, and at last its height.
Part = Iterable[str | float]


def render_picture(view: Balancing, title: str) -> str:
    """Return an SVG document, its size bounded; it says what it leaves out. Its tables count everything."""
    grouping = group_steps(len(view.numbers), min(MAX_GROUPS, MAX_CELLS // view.rows))
    places = sorted(view.find_lowest(MAX_LAYERS))
    return _stack_parts(
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
    yield from _draw_row(62, ("balancedness", "mean", "5th percentile", "worst"), (MARGIN, 200, 290, 350), "muted")
    for n, (name, cells) in enumerate(view.summarise().items(), start=1):
        yield _draw_stroke(f"M{MARGIN:g} {62 + n * LINE - 3.5:g}h24", name)
        yield from _draw_row(62 + n * LINE, cells, (MARGIN + 30, 200, 290, 350), "ink")
    table = [(f"of each {view.unit}", "mean", "most", "in all"), *view.table] if view.table else []
    for n, row in enumerate(table):
        yield from _draw_row(62 + n * LINE, row, (470, 680, 760, 850), "ink" if n else "muted")
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
        yield from _draw_levels(box, floor, 1.0, 4)
        yield from draw_steps(box)
        for name in (name for name in ORDER if name in view.scores):
            yield from _draw_method(box, name, view.scores[name][:, place], grouping, floor)
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
        yield from _draw_scale(box.left, 42, each.scale)
        yield from _draw_map(box, each.values[0], each.scale, grouping)
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
                yield from _draw_legend(box.left, 39 + row * LINE, series.colour, series.legend)
            yield from _draw_series(box, drawn, grouping, f" per {view.unit}" if grouping.size > 1 else "")
    yield (83 + BARS if any(chart.drawn for chart in view.bars) else 8) + AXIS


# ---- plots


@dataclass(frozen=True)
class Box:
    """Where a plot lies, in pixels, and the numbers of the micro-batches or steps from its left to its right, ascending."""

    left: float
    top: float
    width: float
    height: float
    numbers: Array

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    def place(self, step: float) -> float:
        """Return where a step begins, counted from the left."""
        return self.left + step / len(self.numbers) * self.width


def _stack_parts(parts: Sequence[Part]) -> str:
    """Return an SVG document of parts below each other."""
    lines, top = [], 0.0
    for part in parts:
        *drawn, height = part
        lines += [f'<g transform="translate(0 {top:.2f})">', *map(str, drawn), "</g>"]
        top += float(height)
    return "\n".join([open_document(WIDTH, np.ceil(top + MARGIN)), *lines, "</svg>", ""])


def _draw_row(y: float, cells: Sequence[str], places: Sequence[float], colour: str) -> Iterator[str]:
    """A row of a table: the first cell begins at its place, the others end there."""
    for n, (words, x) in enumerate(zip(cells, places, strict=True)):
        yield draw_text(x, y, words, LIGHT[colour], "end" if n else "start")


def _draw_method(box: Box, name: str, values: Array, grouping: Grouping, floor: float) -> Iterator[str]:
    """A method's ``values[steps]``: a line of the means of groups, and a shade down to the lowest of each."""
    xs = [box.place(step) for step in grouping.starts + grouping.sizes / 2]

    def place(heights: Array) -> list[str]:
        return [f"{x:.1f} {box.bottom - (y - floor) / (1 - floor) * box.height:.1f}" for x, y in zip(xs, heights, strict=True)]

    means = place(grouping.average(values))
    if grouping.size > 1:
        outline = "L".join(means + place(grouping.find_lowest(values))[::-1])
        yield f'<path class="range" d="M{outline}z" fill="{LIGHT[name]}" fill-opacity="0.18"/>'
    if len(means) == 1:
        x, y = means[0].split()
        yield f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5" fill="{LIGHT[name]}"/>'
    else:
        yield _draw_stroke("M" + "L".join(means), name)


def _draw_stroke(path: str, name: str) -> str:
    """A line in the colour of a method."""
    dashes = ' stroke-dasharray="4 2.5"' if name == "oracle" else ""
    return (
        f'<path class="{name}" d="{path}" fill="none" stroke="{LIGHT[name]}" stroke-width="1.2" stroke-linejoin="round"{dashes}/>'
    )


def _draw_levels(box: Box, low: float, high: float, most: int) -> Iterator[str]:
    """A thin line and a label at each value of the vertical axis, at most so many."""
    step = choose_step(high - low, most)
    for n in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1):
        y = box.bottom - (n * step - low) / (high - low) * box.height
        yield draw_line(box.left, y, box.right, y, LIGHT["grid"])
        yield draw_text(box.left - 5, y + 3.5, write_number(n * step), LIGHT["muted"], "end")


def draw_steps(box: Box) -> Iterator[str]:
    """The axis of micro-batches or steps; where a round number is not there, the next one is labelled."""
    first, last = int(box.numbers[0]), int(box.numbers[-1])
    step = max(1, int(choose_step(last - first + 1, int(box.width / 50))))
    yield draw_line(box.left, box.bottom, box.right, box.bottom, LIGHT["muted"])
    free = -np.inf
    for index in np.searchsorted(box.numbers, np.arange(-(-first // step) * step, last + 1, step)):
        x = box.place(index + 0.5)
        if x < free:
            continue
        yield draw_line(x, box.bottom, x, box.bottom + 3, LIGHT["muted"])
        yield draw_text(x, box.bottom + 14, str(box.numbers[index]), LIGHT["muted"], "middle")
        free = x + 30


def _draw_scale(left: float, top: float, scale: Scale) -> Iterator[str]:
    """The colours of a heat map, and labels below them."""
    width, last = 240.0, len(scale.shades) - 1
    # Parts of one document share their names: what has the same shades is the same gradient.
    name = f"{scale.shades[0]}-to-{scale.shades[-1]}"
    stops = (f'<stop offset="{n / last:g}" stop-color="{LIGHT[shade]}"/>' for n, shade in enumerate(scale.shades))
    yield f'<linearGradient id="{name}">{"".join(stops)}</linearGradient>'
    yield f'<path d="M{left:.2f} {top:g}h{width:g}v10h-{width:g}z" fill="url(#{name})"/>'
    for place, label in scale.marks:
        yield draw_text(left + place / 100 * width, top + 22, label, LIGHT["muted"], "middle")


def _draw_map(box: Box, values: Array, scale: Scale, grouping: Grouping) -> Iterator[str]:
    """A heat map of ``[groups, rows]``: neighbours in a row that have the same colour are one rectangle of it."""
    paths: dict[int, list[str]] = defaultdict(list)
    edges = [*grouping.starts, grouping.steps]
    rows = values.shape[1]
    for n, row in enumerate(scale.place(values).T):
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]):
            width = edges[end] - edges[begin]
            paths[int(row[begin])].append(f"M{edges[begin]} {n}h{width}v1h-{width}z")
    scaled = f"translate({box.left:.2f} {box.top:.2f}) scale({box.width / grouping.steps:.6g} {box.height / rows:.6g})"
    yield f'<g class="map" transform="{scaled}" shape-rendering="crispEdges">'
    colours = scale.list_colours(LIGHT)
    for colour, cells in paths.items():
        yield f'<path fill="{colours[colour]}" d="{"".join(cells)}"/>'
    yield "</g>"
    step = max(1, int(choose_step(rows, int(box.height / 11))))
    for n in range(0, rows, step):
        yield draw_text(box.left - 5, box.top + (n + 0.5) / rows * box.height + 3.5, str(n), LIGHT["muted"], "end")


def _draw_series(box: Box, series: list[Series], grouping: Grouping, per: str) -> Iterator[str]:
    """Bars from the ground up, the later series before the earlier."""
    heights = [grouping.average(each.values) for each in series]
    highest = max(float(values.max()) for values in heights)
    yield from _draw_levels(box, 0.0, highest, 4)
    for n, (start, size) in enumerate(zip(grouping.starts, grouping.sizes, strict=True)):
        left, width = box.place(start), box.place(start + size) - box.place(start)
        for each, values in zip(series, heights, strict=True):
            if values[n]:
                bar = values[n] / highest * box.height
                title = f"{write_number(values[n])} {each.words}{per}"
                yield draw_rectangle(
                    each.name, left, box.bottom - bar, width - min(1.0, width / 5), bar, LIGHT[each.colour], title
                )
    yield from draw_steps(box)


def _draw_legend(x: float, y: float, colour: str, words: str) -> Iterator[str]:
    """A box of a colour, and its words."""
    yield f'<path d="M{x:.2f} {y:g}h10v10h-10z" fill="{LIGHT[colour]}"/>'
    yield draw_text(x + 15, y + 9, words, LIGHT["ink"], "start")
