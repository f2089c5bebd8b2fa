"""Plots over micro-batches or steps in SVG: a head with figures, charts of layers, heat maps, bars."""

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from counterflow.arrays import Array
from counterflow.report.balance_figures import Grouping, choose_floor
from counterflow.report.colours import LIGHT
from counterflow.report.picture import choose_step, clean_text, write_number
from counterflow.report.shapes import draw_line, draw_rectangle, draw_text, open_document

# Pixels at the default size.
WIDTH, MARGIN, LEFT, GAP, AXIS, LINE = 900.0, 14.0, 34.0, 18.0, 28.0, 15.0
CHART, COLUMNS, ROW, LEAST_MAP, MOST_MAP, BARS = 92.0, 3, 11.0, 44.0, 264.0, 80.0
CHARACTERS = 165
# Shades of a heat map: cells of one shade are one path, and the eye tells no more apart.
SHADES = 96
# The last is drawn on top.
ORDER = ("fixed", "eplb", "oracle", "counterflow")
BOLD = ' font-weight="bold"'

# Elements of a part of the picture, drawn from 0 on, and at last its height.
Part = Iterable[str | float]
# Values of a method, [steps, layers], or their mean, 5th percentile and worst.
Methods = dict[str, Array]
Figures = dict[str, tuple[float, float, float]]


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


def stack_parts(parts: Sequence[Part]) -> str:
    """Return an SVG document of parts below each other."""
    lines, top = [], 0.0
    for part in parts:
        *drawn, height = part
        lines += [f'<g transform="translate(0 {top:.2f})">', *map(str, drawn), "</g>"]
        top += float(height)
    return "\n".join([open_document(WIDTH, np.ceil(top + MARGIN)), *lines, "</svg>", ""])


def draw_head(title: str, size: str, names: dict[str, str], summary: Figures, note: str) -> Part:
    """Title, the table of figures, whose rows are the legend of the lines, and what is not shown."""
    yield draw_text(MARGIN, 24, clean_text(title), LIGHT["ink"], "start", f' font-size="14"{BOLD}')
    yield draw_text(MARGIN, 40, size, LIGHT["muted"], "start")
    y = 62.0
    yield from draw_row(y, ("balancedness", "mean", "5th percentile", "worst"), (MARGIN, 200, 290, 350), "muted")
    for name, values in summary.items():
        y += LINE
        yield draw_stroke(f"M{MARGIN:g} {y - 3.5:g}h24", name)
        cells = (names[name], *(f"{value:.4f}" for value in values))
        yield from draw_row(y, cells, (MARGIN + 30, 200, 290, 350), "ink")
    y += 6
    for line in textwrap.wrap(note, CHARACTERS):
        y += LINE
        yield draw_text(MARGIN, y, line, LIGHT["muted"], "start")
    yield y + 10


def draw_row(y: float, cells: Sequence[str], places: Sequence[float], colour: str) -> Iterator[str]:
    """A row of a table: the first cell begins at its place, the others end there."""
    for n, (words, x) in enumerate(zip(cells, places, strict=True)):
        yield draw_text(x, y, words, LIGHT[colour], "end" if n else "start")


def draw_charts(heading: str, labels: list[int], values: Methods, numbers: Array, grouping: Grouping) -> Part:
    """A chart a layer, all with the same axes; ``values`` are those of the labelled layers."""
    floor = choose_floor(min(float(each.min()) for each in values.values()))
    yield draw_text(MARGIN, 14, heading, LIGHT["ink"], "start", BOLD)
    columns = 2 if len(labels) == 4 else min(COLUMNS, len(labels))
    share = (WIDTH - 2 * MARGIN + GAP) / columns
    for n, label in enumerate(labels):
        row, column = divmod(n, columns)
        top = 36 + row * (CHART + AXIS + 22)
        box = Box(MARGIN + LEFT + column * share, top, share - GAP - LEFT, CHART, numbers)
        yield draw_text(box.left, top - 6, f"layer {label}", LIGHT["ink"], "start")
        yield from draw_levels(box, floor, 1.0, 4)
        yield from draw_steps(box)
        for name in (name for name in ORDER if name in values):
            yield from _draw_method(box, name, values[name][:, n], grouping, floor)
    yield 36 + -(-len(labels) // columns) * (CHART + AXIS + 22)


def _draw_method(box: Box, name: str, values: Array, grouping: Grouping, floor: float) -> Iterator[str]:
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
        yield draw_stroke("M" + "L".join(means), name)


def draw_stroke(path: str, name: str) -> str:
    """A line in the colour of a method."""
    dashes = ' stroke-dasharray="4 2.5"' if name == "oracle" else ""
    return (
        f'<path class="{name}" d="{path}" fill="none" stroke="{LIGHT[name]}" stroke-width="1.2" stroke-linejoin="round"{dashes}/>'
    )


def draw_levels(box: Box, low: float, high: float, most: int) -> Iterator[str]:
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


def draw_scale(left: float, top: float, marks: list[tuple[float, str]], choose_colour: Callable[[float], str]) -> Iterator[str]:
    """The colours of a heat map from 0 to 1, and labels at places in per cent below them."""
    width = 240.0
    piece = width / SHADES
    for n in range(SHADES):
        colour = choose_colour((n + 0.5) / SHADES)
        box = f"M{left + n * piece:.2f} {top:g}h{piece:.2f}v10h-{piece:.2f}z"
        yield f'<path d="{box}" fill="{colour}" shape-rendering="crispEdges"/>'
    for place, label in marks:
        yield draw_text(left + place / 100 * width, top + 22, label, LIGHT["muted"], "middle")


def draw_map(box: Box, places: Array, grouping: Grouping, choose_colour: Callable[[float], str]) -> Iterator[str]:
    """A heat map of ``[groups, rows]``, from 0 to 1: neighbours in a row that have the same shade are one rectangle of it."""
    paths: dict[str, list[str]] = defaultdict(list)
    edges = [*grouping.starts, grouping.steps]
    shades = np.round(places * SHADES) / SHADES
    rows = places.shape[1]
    for n in range(rows):
        row = shades[:, n]
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]):
            width = edges[end] - edges[begin]
            paths[choose_colour(float(row[begin]))].append(f"M{edges[begin]} {n}h{width}v1h-{width}z")
    scale = f"translate({box.left:.2f} {box.top:.2f}) scale({box.width / grouping.steps:.6g} {box.height / rows:.6g})"
    yield f'<g class="map" transform="{scale}" shape-rendering="crispEdges">'
    for colour, cells in paths.items():
        yield f'<path fill="{colour}" d="{"".join(cells)}"/>'
    yield "</g>"
    step = max(1, int(choose_step(rows, int(box.height / 11))))
    for n in range(0, rows, step):
        yield draw_text(box.left - 5, box.top + (n + 0.5) / rows * box.height + 3.5, str(n), LIGHT["muted"], "end")


def draw_bars(box: Box, series: list[tuple[str, str, str, Array]], grouping: Grouping) -> Iterator[str]:
    """Bars from the ground up, the later series before the earlier: class, colour, words and ``[groups]`` of each."""
    highest = max(float(values.max()) for *_, values in series)
    yield from draw_levels(box, 0.0, highest, 4)
    for n, (start, size) in enumerate(zip(grouping.starts, grouping.sizes, strict=True)):
        left, width = box.place(start), box.place(start + size) - box.place(start)
        for name, colour, words, values in series:
            if values[n]:
                bar = values[n] / highest * box.height
                title = f"{write_number(values[n])} {words}"
                yield draw_rectangle(name, left, box.bottom - bar, width - min(1.0, width / 5), bar, LIGHT[colour], title)
    yield from draw_steps(box)


def draw_legend(x: float, y: float, rows: list[tuple[str, str]]) -> Iterator[str]:
    """Boxes of colours, and their words, in a line."""
    for colour, words in rows:
        yield f'<path d="M{x:.2f} {y:g}h10v10h-10z" fill="{LIGHT[colour]}"/>'
        yield draw_text(x + 15, y + 9, words, LIGHT["ink"], "start")
        x += 30 + 4.8 * len(words)
