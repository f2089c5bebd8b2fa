"""A static picture of a balance replay for papers: balancedness by layer, loads before and after, moves; text as text."""

import numpy as np

from counterflow.balance.replay import Replay
from counterflow.report.balance_figures import (
    METHOD_NAMES,
    Grouping,
    check_replay,
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
from counterflow.report.plots import (
    AXIS,
    BARS,
    BOLD,
    GAP,
    LEAST_MAP,
    LEFT,
    MARGIN,
    MOST_MAP,
    ROW,
    WIDTH,
    Box,
    Part,
    draw_bars,
    draw_charts,
    draw_head,
    draw_legend,
    draw_map,
    draw_scale,
    draw_steps,
    stack_parts,
)
from counterflow.report.shapes import draw_text

# What bounds the picture: layers drawn, groups of micro-batches in a plot, cells of a heat map.
MAX_LAYERS, MAX_GROUPS, MAX_CELLS = 12, 360, 40_000


def render_replay_svg(replay: Replay, title: str) -> str:
    """Return an SVG document, its size bounded whatever the size of the replay.

    It shows at most the 12 layers that fixed homes serve worst, the loads of the worst, and more than 360 micro-batches, or
    40,000 loads of a layer, in groups; it says so. Its table counts everything. Raises `BalanceError` for a replay that cannot
    be drawn.
    """
    check_replay(replay)
    steps = len(replay.moves)
    grouping, numbers = group_steps(steps, min(MAX_GROUPS, MAX_CELLS // replay.cluster.ranks)), replay.first + np.arange(steps)
    layers = sorted(find_worst_layers(replay, MAX_LAYERS))
    values = {name: each[:, layers] for name, each in replay.balancedness.items()}
    note = _describe_choice(replay, grouping)
    return stack_parts(
        [
            draw_head(title, describe_size(replay), METHOD_NAMES, summarise_methods(replay), note),
            draw_charts("Balancedness over micro-batches", layers, values, numbers, grouping),
            _draw_maps(replay, grouping),
            _draw_moves(replay, grouping),
        ]
    )


def _describe_choice(replay: Replay, grouping: Grouping) -> str:
    layers = replay.moves.shape[1]
    shown = (
        f"Shown: {MAX_LAYERS} of {layers:,} layers, those with the least balancedness under fixed homes."
        if layers > MAX_LAYERS
        else ""
    )
    return " ".join(filter(None, (shown, describe_grouping(grouping))))


def _draw_maps(replay: Replay, grouping: Grouping) -> Part:
    """Loads of the worst layer before and after, on one scale."""
    steps, layers, ranks = replay.fixed_loads.shape
    (layer,) = find_worst_layers(replay, 1)
    maps = [weigh_loads(tokens, layer, grouping) for tokens in (replay.fixed_loads, replay.loads)]
    both = np.stack(maps)
    root = choose_root(both)
    which = f"layer {layer}" + (", the worst under fixed homes" if layers > 1 else "")
    heading = f"Tokens per rank over the mean rank's, rank by micro-batch: {which}"
    yield draw_text(MARGIN, 14, heading, LIGHT["ink"], "start", BOLD)
    marks = [(25.0 * place, label) for place, label in enumerate(list_marks(both, root))]
    yield from draw_scale(MARGIN + LEFT, 24, marks, choose_share_colour)
    height = min(max(ROW * ranks, LEAST_MAP), MOST_MAP)
    share = (WIDTH - 2 * MARGIN + GAP) / 2
    for n, (words, weighed) in enumerate(zip(("before: fixed homes", "after: counterflow"), maps, strict=True)):
        box = Box(MARGIN + LEFT + n * share, 76, share - GAP - LEFT, height, replay.first + np.arange(steps))
        yield draw_text(box.left, 70, words, LIGHT["ink"], "start")
        yield from draw_map(box, place_loads(weighed, root) / 4, grouping, choose_share_colour)
        yield from draw_steps(box)
    yield 76 + height + AXIS + 10


def choose_share_colour(share: float) -> str:
    """Return the colour of a share of the scale of loads, from 0 to 1, on white."""
    return choose_load_colour(4 * share, LIGHT)


def _draw_moves(replay: Replay, grouping: Grouping) -> Part:
    """Bars of clones sent per micro-batch, those from another node dark."""
    yield draw_text(MARGIN, 14, "Moves, all layers", LIGHT["ink"], "start", BOLD)
    yield draw_text(MARGIN, 30, describe_moves(replay), LIGHT["muted"], "start")
    if not replay.moves.any():
        yield 32.0
        return
    moves, far = (grouping.average(counts.sum(1)) for counts in (replay.moves, replay.off_node_moves))
    box = Box(MARGIN + LEFT, 62, WIDTH - 2 * MARGIN - LEFT, BARS, replay.first + np.arange(grouping.steps))
    within = "clones sent per micro-batch" + (", within the node" if far.any() else "")
    yield from draw_legend(box.left, 39, [("up-F", within), *([("up-B", "from another node")] if far.any() else [])])
    series = [("moves", "up-F", "clones per micro-batch", moves), ("far", "up-B", "of them from another node", far)]
    yield from draw_bars(box, series, grouping)
    yield box.bottom + AXIS
