"""A static picture of a balance replay for papers: balancedness by layer, loads before and after, moves; text as text."""

import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from counterflow.balance.cluster import Array
from counterflow.balance.replay import Replay
from counterflow.report.balance_figures import (
    METHOD_NAMES,
    Grouping,
    check_replay,
    choose_floor,
    choose_root,
    describe_grouping,
    describe_moves,
    describe_size,
    find_worst_layers,
    group_steps,
    list_marks,
    place_loads,
    summarise_methods,
    weigh_loads,
)
from counterflow.report.colours import LIGHT, choose_load_colour
from counterflow.report.picture import choose_step, clean_text, write_number
from counterflow.report.shapes import draw_line, draw_rectangle, draw_text, open_document

# What bounds the picture: layers drawn, groups of micro-batches in a plot, cells of a heat map.
MAX_LAYERS, MAX_GROUPS, MAX_CELLS = 12, 360, 40_000
# Pixels at the default size.
WIDTH, MARGIN, LEFT, GAP, AXIS, LINE = 900.0, 14.0, 34.0, 18.0, 28.0, 15.0
CHART, COLUMNS, ROW, LEAST_MAP, MOST_MAP, BARS = 92.0, 3, 11.0, 44.0, 264.0, 80.0
CHARACTERS = 165
# Shades of a heat map: cells of one shade are one path, and the eye tells no more apart.
SHADES = 96
# The last is drawn on top.
ORDER = ("fixed", "eplb", "oracle", "counterflow")


@dataclass(frozen=True)
class _Box:
    """Where a plot lies, in pixels, and the micro-batches that run from its left to its right."""

    left: float
    top: float
    width: float
    height: float
    first: int
    steps: int

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def right(self) -> float:
        return self.left + self.width

    def place(self, step: float) -> float:
        return self.left + step / self.steps * self.width


def render_replay_svg(replay: Replay, title: str) -> str:
    """Return an SVG document, its size bounded whatever the size of the replay.

    It shows at most the 12 layers that fixed homes serve worst, the loads of the worst, and more than 360 micro-batches, or
    40,000 loads of a layer, in groups; it says so. Its table counts everything. Raises `BalanceError` for a replay that cannot
    be drawn.
    """
    check_replay(replay)
    grouping = group_steps(len(replay.moves), min(MAX_GROUPS, MAX_CELLS // replay.cluster.ranks))
    lines, top = [], 0.0
    for part in (
        _draw_head(replay, title, grouping),
        _draw_charts(replay, grouping),
        _draw_maps(replay, grouping),
        _draw_moves(replay, grouping),
    ):
        # Each part is drawn from 0 on and ends with its height.
        *drawn, height = part
        lines += [f'<g transform="translate(0 {top:.2f})">', *map(str, drawn), "</g>"]
        top += float(height)
    return "\n".join([open_document(WIDTH, np.ceil(top + MARGIN)), *lines, "</svg>", ""])


def _draw_head(replay: Replay, title: str, grouping: Grouping) -> Iterator[str | float]:
    """Title, the table of figures, whose rows are the legend of the lines, and what is not shown."""
    yield draw_text(MARGIN, 24, clean_text(title), LIGHT["ink"], "start", ' font-size="14" font-weight="bold"')
    yield draw_text(MARGIN, 40, describe_size(replay), LIGHT["muted"], "start")
    y = 62.0
    for x, words, anchor in (
        (MARGIN, "balancedness", "start"),
        (200, "mean", "end"),
        (290, "5th percentile", "end"),
        (350, "worst", "end"),
    ):
        yield draw_text(x, y, words, LIGHT["muted"], anchor)
    for name, values in summarise_methods(replay).items():
        y += LINE
        yield _draw_stroke(f"M{MARGIN:g} {y - 3.5:g}h24", name)
        yield draw_text(MARGIN + 30, y, METHOD_NAMES[name], LIGHT["ink"], "start")
        for x, value in zip((200, 290, 350), values, strict=True):
            yield draw_text(x, y, f"{value:.4f}", LIGHT["ink"], "end")
    y += 6
    for line in textwrap.wrap(_describe_choice(replay, grouping), CHARACTERS):
        y += LINE
        yield draw_text(MARGIN, y, line, LIGHT["muted"], "start")
    yield y + 10


def _describe_choice(replay: Replay, grouping: Grouping) -> str:
    layers = replay.moves.shape[1]
    shown = (
        f"Shown: {MAX_LAYERS} of {layers:,} layers, those with the least balancedness under fixed homes."
        if layers > MAX_LAYERS
        else ""
    )
    return " ".join(filter(None, (shown, describe_grouping(grouping))))


def _draw_charts(replay: Replay, grouping: Grouping) -> Iterator[str | float]:
    """A chart a layer, all with the same axes."""
    layers = sorted(find_worst_layers(replay, MAX_LAYERS))
    floor = choose_floor(min(float(values[:, layers].min()) for values in replay.balancedness.values()))
    yield draw_text(MARGIN, 14, "Balancedness over micro-batches", LIGHT["ink"], "start", ' font-weight="bold"')
    columns = 2 if len(layers) == 4 else min(COLUMNS, len(layers))
    share = (WIDTH - 2 * MARGIN + GAP) / columns
    for n, layer in enumerate(layers):
        row, column = divmod(n, columns)
        top = 36 + row * (CHART + AXIS + 22)
        box = _Box(MARGIN + LEFT + column * share, top, share - GAP - LEFT, CHART, replay.first, grouping.steps)
        yield draw_text(box.left, top - 6, f"layer {layer}", LIGHT["ink"], "start")
        yield from _draw_levels(box, floor, 1.0, 4)
        yield from _draw_steps(box)
        for name in (name for name in ORDER if name in replay.balancedness):
            yield from _draw_method(box, name, replay.balancedness[name][:, layer], grouping, floor)
    yield 36 + -(-len(layers) // columns) * (CHART + AXIS + 22)


def _draw_method(box: _Box, name: str, values: Array, grouping: Grouping, floor: float) -> Iterator[str]:
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
    dashes = ' stroke-dasharray="4 2.5"' if name == "oracle" else ""
    return (
        f'<path class="{name}" d="{path}" fill="none" stroke="{LIGHT[name]}" stroke-width="1.2" stroke-linejoin="round"{dashes}/>'
    )


def _draw_levels(box: _Box, low: float, high: float, most: int) -> Iterator[str]:
    step = choose_step(high - low, most)
    for n in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1):
        y = box.bottom - (n * step - low) / (high - low) * box.height
        yield draw_line(box.left, y, box.right, y, LIGHT["grid"])
        yield draw_text(box.left - 5, y + 3.5, write_number(n * step), LIGHT["muted"], "end")


def _draw_steps(box: _Box) -> Iterator[str]:
    step = max(1, int(choose_step(box.steps, int(box.width / 50))))
    yield draw_line(box.left, box.bottom, box.right, box.bottom, LIGHT["muted"])
    for n in range(-(-box.first // step) * step, box.first + box.steps, step):
        x = box.place(n - box.first + 0.5)
        yield draw_line(x, box.bottom, x, box.bottom + 3, LIGHT["muted"])
        yield draw_text(x, box.bottom + 14, str(n), LIGHT["muted"], "middle")


def _draw_maps(replay: Replay, grouping: Grouping) -> Iterator[str | float]:
    """Loads of the worst layer before and after, on one scale."""
    steps, layers, ranks = replay.fixed_loads.shape
    (layer,) = find_worst_layers(replay, 1)
    maps = [weigh_loads(tokens, layer, grouping) for tokens in (replay.fixed_loads, replay.loads)]
    both = np.stack(maps)
    root = choose_root(both)
    which = f"layer {layer}" + (", the worst under fixed homes" if layers > 1 else "")
    heading = f"Tokens per rank over the mean rank's, rank by micro-batch: {which}"
    yield draw_text(MARGIN, 14, heading, LIGHT["ink"], "start", ' font-weight="bold"')
    yield from _draw_scale(list_marks(both, root))
    height = min(max(ROW * ranks, LEAST_MAP), MOST_MAP)
    share = (WIDTH - 2 * MARGIN + GAP) / 2
    for n, (words, weighed) in enumerate(zip(("before: fixed homes", "after: counterflow"), maps, strict=True)):
        box = _Box(MARGIN + LEFT + n * share, 76, share - GAP - LEFT, height, replay.first, steps)
        yield draw_text(box.left, 70, words, LIGHT["ink"], "start")
        yield from _draw_map(box, place_loads(weighed, root), grouping)
        yield from _draw_steps(box)
    yield 76 + height + AXIS + 10


def _draw_scale(marks: list[str]) -> Iterator[str]:
    left, width = MARGIN + LEFT, 240.0
    piece = width / SHADES
    for n in range(SHADES):
        colour = choose_load_colour((n + 0.5) / SHADES * 4, LIGHT)
        yield f'<path d="M{left + n * piece:.2f} 24h{piece:.2f}v10h-{piece:.2f}z" fill="{colour}" shape-rendering="crispEdges"/>'
    for place, label in enumerate(marks):
        yield draw_text(left + place / 4 * width, 46, label, LIGHT["muted"], "middle")


def _draw_map(box: _Box, places: Array, grouping: Grouping) -> Iterator[str]:
    """One path a shade: neighbours in a row that have the same shade are one rectangle of it."""
    paths: dict[str, list[str]] = defaultdict(list)
    edges = [*grouping.starts, grouping.steps]
    shades = np.round(places / 4 * SHADES) * 4 / SHADES
    ranks = places.shape[1]
    for rank in range(ranks):
        row = shades[:, rank]
        begins = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for begin, end in zip(begins, begins[1:], strict=False):
            width = edges[end] - edges[begin]
            paths[choose_load_colour(float(row[begin]), LIGHT)].append(f"M{edges[begin]} {rank}h{width}v1h-{width}z")
    scale = f"translate({box.left:.2f} {box.top:.2f}) scale({box.width / grouping.steps:.6g} {box.height / ranks:.6g})"
    yield f'<g class="map" transform="{scale}" shape-rendering="crispEdges">'
    for colour, cells in paths.items():
        yield f'<path fill="{colour}" d="{"".join(cells)}"/>'
    yield "</g>"
    step_of_ranks = max(1, int(choose_step(ranks, int(box.height / 11))))
    for rank in range(0, ranks, step_of_ranks):
        yield draw_text(box.left - 5, box.top + (rank + 0.5) / ranks * box.height + 3.5, str(rank), LIGHT["muted"], "end")


def _draw_moves(replay: Replay, grouping: Grouping) -> Iterator[str | float]:
    """Bars of clones sent per micro-batch, those from another node dark."""
    yield draw_text(MARGIN, 14, "Moves, all layers", LIGHT["ink"], "start", ' font-weight="bold"')
    yield draw_text(MARGIN, 30, describe_moves(replay), LIGHT["muted"], "start")
    if not replay.moves.any():
        yield 32.0
        return
    moves, far = (grouping.average(counts.sum(1)) for counts in (replay.moves, replay.off_node_moves))
    box = _Box(MARGIN + LEFT, 62, WIDTH - 2 * MARGIN - LEFT, BARS, replay.first, grouping.steps)
    yield from _draw_legend(box, bool(far.any()))
    yield from _draw_levels(box, 0.0, float(moves.max()), 4)
    for start, size, *counts in zip(grouping.starts, grouping.sizes, moves, far, strict=True):
        for name, count, colour in zip(("moves", "far"), counts, ("up-F", "up-B"), strict=True):
            if count:
                left, width = box.place(start), box.place(start + size) - box.place(start)
                bar = count / moves.max() * box.height
                words = f"{write_number(count)} {'clones per micro-batch' if name == 'moves' else 'of them from another node'}"
                yield draw_rectangle(name, left, box.bottom - bar, width - min(1.0, width / 5), bar, LIGHT[colour], words)
    yield from _draw_steps(box)
    yield box.bottom + AXIS


def _draw_legend(box: _Box, far: bool) -> Iterator[str]:
    rows = [
        ("up-F", "clones sent per micro-batch" + (", within the node" if far else "")),
        *([("up-B", "from another node")] if far else []),
    ]
    x = box.left
    for colour, words in rows:
        yield f'<path d="M{x:.2f} 39h10v10h-10z" fill="{LIGHT[colour]}"/>'
        yield draw_text(x + 15, 48, words, LIGHT["ink"], "start")
        x += 30 + 4.8 * len(words)
