"""A static picture of a recorded run's balancing for papers: balancedness by layer, loads and clones of experts, transfers."""

from counterflow.balance.files.recorded import RecordedBalance
from counterflow.report.balance_figures import (
    Grouping,
    choose_root,
    describe_grouping,
    divide_by_mean,
    find_lowest_layers,
    group_steps,
    list_marks,
    place_loads,
)
from counterflow.report.balance_svg import MAX_CELLS, MAX_GROUPS, MAX_LAYERS, choose_share_colour
from counterflow.report.colours import LIGHT
from counterflow.report.plots import (
    AXIS,
    BARS,
    BOLD,
    GAP,
    LEAST_MAP,
    LEFT,
    LINE,
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
    draw_row,
    draw_scale,
    draw_steps,
    stack_parts,
)
from counterflow.report.record_figures import (
    RECORD_NAMES,
    check_record,
    choose_clone_colour,
    describe_run,
    list_bars,
    list_clone_marks,
    list_scores,
    list_transfers,
    place_clones,
    summarise_scores,
)
from counterflow.report.shapes import draw_text


def render_record_svg(record: RecordedBalance, title: str) -> str:
    """Return an SVG document, its size bounded whatever the length of the run.

    It shows at most the 12 layers least balanced on homes alone, experts of the least balanced, and more than 360 steps, or
    40,000 cells of a heat map, in groups; it says so. Its tables count everything. Raises `BalanceError` for a record that cannot
    be drawn or loads that cannot be read.
    """
    check_record(record)
    grouping = group_steps(len(record.steps), min(MAX_GROUPS, MAX_CELLS // record.experts))
    places = sorted(find_lowest_layers(record.before, MAX_LAYERS))
    values = {name: each[:, places] for name, each in list_scores(record).items()}
    labels = record.layers[places].tolist()
    return stack_parts(
        [
            _draw_tables(record, title, grouping),
            draw_charts("Balancedness over steps", labels, values, record.steps, grouping),
            _draw_maps(record, grouping),
            _draw_transfers(record, grouping),
        ]
    )


def _draw_tables(record: RecordedBalance, title: str, grouping: Grouping) -> Part:
    """The head, and beside its table that of transfers."""
    rows = list_transfers(record)
    *drawn, _ = draw_head(title, describe_run(record), RECORD_NAMES, summarise_scores(record), "")
    yield from drawn
    places = (470, 680, 760, 850)
    yield from draw_row(62, ("of each step", "mean", "most", "in all"), places, "muted")
    for n, row in enumerate(rows, start=1):
        yield from draw_row(62 + n * LINE, row, places, "ink")
    y = 62 + (len(rows) + 1) * LINE
    for words in filter(None, (_describe_layers(record), *describe_grouping(grouping, "steps").split(". "))):
        y += LINE
        yield draw_text(MARGIN, y, words.rstrip(".") + ".", LIGHT["muted"], "start")
    yield y + 10


def _describe_layers(record: RecordedBalance) -> str:
    count = len(record.layers)
    return f"Shown: {MAX_LAYERS} of {count:,} layers, those least balanced on homes alone." if count > MAX_LAYERS else ""


def _draw_maps(record: RecordedBalance, grouping: Grouping) -> Part:
    """Loads and clones of the experts of the layer least balanced on homes alone."""
    (place,) = find_lowest_layers(record.before, 1)
    weighed = divide_by_mean(record.sum_loads(grouping.starts)[:, place])
    clones = record.count_clones(grouping.starts)[:, place]
    root, most = choose_root(weighed), max(1.0, float(clones.max()))
    which = f"layer {record.layers[place]}" + (", the least balanced on homes alone" if len(record.layers) > 1 else "")
    yield draw_text(MARGIN, 14, f"Experts by step: {which}", LIGHT["ink"], "start", BOLD)
    height = min(max(ROW * record.experts, LEAST_MAP), MOST_MAP)
    share = (WIDTH - 2 * MARGIN + GAP) / 2
    marks = [(25.0 * n, label) for n, label in enumerate(list_marks(weighed, root))]
    for n, (words, places, scale, choose_colour) in enumerate(
        (
            ("tokens over the mean expert's", place_loads(weighed, root) / 4, marks, choose_share_colour),
            ("clones beside the home", place_clones(clones, most), list_clone_marks(most), _choose_clone_colour),
        )
    ):
        box = Box(MARGIN + LEFT + n * share, 84, share - GAP - LEFT, height, record.steps)
        yield draw_text(box.left, 34, words, LIGHT["ink"], "start")
        yield from draw_scale(box.left, 42, scale, choose_colour)
        yield from draw_map(box, places, grouping, choose_colour)
        yield from draw_steps(box)
    yield 84 + height + AXIS + 10


def _choose_clone_colour(share: float) -> str:
    return choose_clone_colour(share, LIGHT)


def _draw_transfers(record: RecordedBalance, grouping: Grouping) -> Part:
    """Bars of clones sent and of times, side by side."""
    yield draw_text(MARGIN, 14, "Transfers, all layers", LIGHT["ink"], "start", BOLD)
    share = (WIDTH - 2 * MARGIN + GAP) / 2
    for n, chart in enumerate(list_bars(record, grouping)):
        box = Box(MARGIN + LEFT + n * share, 68, share - GAP - LEFT, BARS, record.steps)
        if not chart.drawn:
            yield draw_text(box.left, 33, chart.nothing, LIGHT["muted"], "start")
            continue
        drawn = [each for each in chart.series if each[1]]
        for row, (_, colour, _, legend, _) in enumerate(drawn):
            yield from draw_legend(box.left, 24 + row * LINE, [(colour, legend)])
        series = [(name, colour, words, grouping.average(values)) for name, colour, words, _, values in drawn]
        yield from draw_bars(box, series, grouping)
    yield 68 + BARS + AXIS
