"""A static vector picture for papers: pictures stacked on one time axis, on white, text as text."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from counterflow.report.colours import DIRECTION_NAMES, KIND_NAMES, LIGHT, REDUCTION_NAME, choose_text_colour, mix_shades
from counterflow.report.picture import Picture, choose_step, make_legend, prepare_pictures, write_number
from counterflow.report.shapes import FONT, draw_line, draw_rectangle, draw_text, open_document
from counterflow.schedule.actions import Action
from counterflow.schedule.sharing import Interval, Part, Sharing
from counterflow.schedule.timeline import Span

MAX_SVG_SPANS = 200_000

# Pixels at the default size.
GUTTER, MARGIN, ROW, HEAD, AXIS, LEGEND = 56.0, 14.0, 24.0, 44.0, 30.0, 30.0
LEGEND_LINE = 22.0
STRIP = 4.0
# Opacity of a part that does not have its rank, height of the line of a communication, pixels from which on both are drawn.
AWAY, LINE, DETAILED = 0.28, 1.8, 10.0
LEAST_WIDTH, MOST_WIDTH, BLOCK = 760.0, 1800.0, 20.0
LEAST_FONT, CHARACTER = 5.0, 0.6


@dataclass(frozen=True)
class _Plot:
    """Where one picture lies: its top, and how many pixels a unit of time takes."""

    picture: Picture
    top: float
    scale: float

    @property
    def bottom(self) -> float:
        return self.top + HEAD + ROW * self.picture.table.ranks

    def place(self, time: float) -> float:
        return GUTTER + time * self.scale


def render_svg(pictures: Sequence[Picture]) -> str:
    """Return an SVG document; blocks carry their action and times, idle spans their reason, as ``<title>``.

    Raises `CounterflowError` for no picture, one without spans, or more than 200,000 spans in all.
    """
    pictures = prepare_pictures(pictures, MAX_SVG_SPANS, "an SVG")
    total = max(picture.timeline.makespan for picture in pictures) or 1.0
    width = _choose_width(pictures, total)
    plots, top = [], 0.0
    for picture in pictures:
        plots.append(_Plot(picture, top, (width - GUTTER - MARGIN) / total))
        top = plots[-1].bottom + 6
    more = LEGEND_LINE if make_legend(pictures).communications else 0.0
    lines = [*_draw_frame(width, top + AXIS + LEGEND + more), *_draw_axis(plots, total, top)]
    for plot in plots:
        lines += _draw_plot(plot)
    lines += _draw_legend(pictures, top + AXIS)
    return "\n".join([*lines, "</svg>", ""])


def _choose_width(pictures: Sequence[Picture], total: float) -> float:
    """So wide that a usual block holds its label, within what a page can show."""
    usual = statistics.median(span.end - span.start for picture in pictures for span in picture.timeline.spans)
    wanted = total / usual * BLOCK if usual else LEAST_WIDTH
    return round(GUTTER + MARGIN + min(max(wanted, LEAST_WIDTH), MOST_WIDTH))


def _draw_frame(width: float, height: float) -> Iterator[str]:
    yield open_document(width, height)
    yield '<defs><pattern id="idle" width="5" height="5" patternUnits="userSpaceOnUse">'
    yield f'<rect width="5" height="5" fill="{LIGHT["idle"]}"/>'
    yield f'<path d="M-1 6L6 -1M-1 1L1 -1M4 6L6 4" stroke="{LIGHT["hatch"]}" stroke-width="0.7"/></pattern>'
    yield '<pattern id="waiting" width="5" height="5" patternUnits="userSpaceOnUse">'
    yield f'<rect width="5" height="5" fill="{LIGHT["ground"]}"/>'
    yield f'<path d="M-1 6L6 -1M-1 1L1 -1M4 6L6 4" stroke="{LIGHT["waiting"]}" stroke-width="0.8"/></pattern></defs>'


def _draw_axis(plots: list[_Plot], total: float, top: float) -> Iterator[str]:
    """Ticks below all plots, with a thin line up through each."""
    scale = plots[0].scale
    step = choose_step(total, int(total * scale / 60))
    for n in range(int(total / step * (1 + 1e-9)) + 1):
        x = GUTTER + n * step * scale
        for plot in plots:
            yield draw_line(x, plot.top + HEAD - 2, x, plot.bottom + 2, LIGHT["grid"])
        yield draw_line(x, top - 2, x, top + 3, LIGHT["muted"])
        yield draw_text(x, top + 14, write_number(n * step), LIGHT["muted"], "middle")
    yield draw_line(GUTTER, top - 2, GUTTER + total * scale, top - 2, LIGHT["muted"])
    yield draw_text(GUTTER - 8, top + 14, "time", LIGHT["muted"], "end")


def _draw_plot(plot: _Plot) -> Iterator[str]:
    picture = plot.picture
    figures = " · ".join(f"{name} {value}" for name, value in picture.summarise().items())
    yield "<g>"
    yield draw_text(GUTTER, plot.top + 18, picture.title, LIGHT["ink"], "start", ' font-size="13" font-weight="bold"')
    yield draw_text(GUTTER, plot.top + 34, figures, LIGHT["muted"], "start")
    idle, reductions = picture.find_idle(), picture.split_reductions()
    sharing = [{one.span: one for one in row} for row in picture.split_sharing()]
    for rank, row in enumerate(picture.split_ranks()):
        top = plot.top + HEAD + rank * ROW
        yield draw_text(GUTTER - 8, top + ROW / 2 + 3.5, f"rank {rank}", LIGHT["ink"], "end")
        for gap in idle[rank]:
            left, right = plot.place(gap.start), plot.place(gap.end)
            yield draw_rectangle("idle", left, top + 1, right - left, ROW - 2, "url(#idle)", f"rank {rank} is idle: {gap.reason}")
        for span in row:
            yield from _draw_block(plot, span, sharing[rank].get(span), top)
        for span in reductions[rank]:
            left, right = plot.place(span.start), plot.place(span.end)
            words = f"{span.action}, {_name((span.start, span.end))}"
            yield draw_rectangle("reduction", left, top + ROW - STRIP, right - left, STRIP, LIGHT["reduction"], words)
    yield "</g>"


def _draw_block(plot: _Plot, span: Span, sharing: Sharing | None, top: float) -> Iterator[str]:
    """A single action fills its block; a pair has its F above, its B below and a frame around both."""
    left, right = plot.place(span.start), plot.place(span.end)
    parts = list(span.action.singles())
    height = (ROW - 2) / len(parts)
    times = _name((span.start, span.end))
    if sharing is not None and right - left >= DETAILED:
        yield from _draw_shared(plot, sharing, top + 1, height, times)
    else:
        for n, part in enumerate(parts):
            yield from _draw_part(plot.picture, part, left, right, top + 1 + n * height, height, times)
    if len(parts) > 1:
        stroke = min(1.2, (right - left) / 6)
        inset = stroke / 2
        yield (
            f'<rect class="pair" x="{left + inset:.2f}" y="{top + 1 + inset:.2f}" width="{max(right - left - stroke, 0):.2f}" '
            f'height="{ROW - 2 - stroke:.2f}" fill="none" stroke="{LIGHT["frame"]}" stroke-width="{stroke:.2f}"/>'
        )


def _draw_shared(plot: _Plot, sharing: Sharing, top: float, height: float, times: str) -> Iterator[str]:
    """A part is pale where it does not have the rank; stripes are waits, a line is a communication under way."""
    span, words = sharing.span, f"waiting {write_number(sharing.waiting)}, communication hidden {write_number(sharing.hidden)}"
    tops = [top + n * height for n in range(len(sharing.parts))]
    foot = 1.2 if len(tops) > 1 else 0.0

    def draw(name: str, interval: Interval, y: float, high: float, fill: str, title: str) -> str:
        left, right = map(plot.place, interval)
        return draw_rectangle(name, left, y, right - left, high, fill, title)

    for part, y in zip(sharing.parts, tops, strict=True):
        way, title = plot.picture.find_direction(part.single), f"{part.single}, {times}; {words}"
        fill = mix_shades(AWAY, [LIGHT["ground"], LIGHT[f"{way}-{part.single.kind}"]])
        yield draw(f"{part.single.kind} {way}", (span.start, span.end), y, height, fill, title)
        for one in part.computes:
            yield draw("computes", one, y, height, LIGHT[f"{way}-{part.single.kind}"], f"{part.single} computes, {_name(one)}")
    for part in sharing.parts:
        for one in part.waits:
            title = f"{part.single} waits for its communication, {_name(one)}"
            yield draw("waiting", one, top, height * len(tops), "url(#waiting)", title)
    for part, y in zip(sharing.parts, tops, strict=True):
        for one in part.under_way:
            title = f"communication of {part.single}, {_name(one)}"
            yield draw("communication", one, y + height - foot - LINE, LINE, LIGHT["communication"], title)
        yield from _draw_widest_label(plot, part, y, height)


def _draw_widest_label(plot: _Plot, part: Part, top: float, height: float) -> Iterator[str]:
    if part.computes:
        start, end = max(part.computes, key=lambda one: one[1] - one[0])
        yield from _draw_label(part.single, plot.place(start), plot.place(end), top, height)


def _name(interval: Interval) -> str:
    return f"{write_number(interval[0])} to {write_number(interval[1])}"


def _draw_part(picture: Picture, part: Action, left: float, right: float, top: float, height: float, times: str) -> Iterator[str]:
    way = picture.find_direction(part)
    gap = 0.6 if right - left > 4 else 0.0
    yield draw_rectangle(
        f"{part.kind} {way}", left, top, right - left - gap, height, LIGHT[f"{way}-{part.kind}"], f"{part}, {times}"
    )
    yield from _draw_label(part, left, right - gap, top, height)


def _draw_label(part: Action, left: float, right: float, top: float, height: float) -> Iterator[str]:
    label = f"{part.kind}{part.microbatch}"
    # One size for numbers of one and two digits in blocks of one width; a W is wide.
    letters = max(3.0, len(label)) + (0.5 if part.kind == "W" else 0.0)
    size = min(FONT, height - 3.5, (right - left - 3) / (letters * CHARACTER))
    if size >= LEAST_FONT:
        middle, base = (left + right) / 2, top + height / 2 + size * 0.36
        yield draw_text(middle, base, label, choose_text_colour(part.kind), "middle", f' font-size="{size:.1f}"')


def _draw_legend(pictures: Sequence[Picture], top: float) -> Iterator[str]:
    x, legend = GUTTER, make_legend(pictures)
    for way in legend.directions:
        for kind in legend.kinds:
            yield _legend_box(x, top, LIGHT[f"{way}-{kind}"], LIGHT[f"{way}-{kind}"])
            yield draw_text(x + 8, top + 12, kind, choose_text_colour(kind), "middle")
            x += 17
        yield draw_text(x + 4, top + 12, DIRECTION_NAMES[way], LIGHT["ink"], "start")
        x += 4 + len(DIRECTION_NAMES[way]) * 5.2 + 14
    words = ", ".join(f"{kind} {KIND_NAMES[kind]}" for kind in legend.kinds)
    yield draw_text(x, top + 12, words, LIGHT["muted"], "start")
    x += len(words) * 5 + 14
    if legend.paired:
        yield _legend_box(x, top, LIGHT["up-F"], LIGHT["frame"])
        yield f'<path d="M{x + 0.5:.2f} {top + 8:.2f}h15v7.5h-15z" fill="{LIGHT["up-B"]}"/>'
        yield draw_text(x + 21, top + 12, "F and B overlapped", LIGHT["ink"], "start")
        x += 126
    yield _legend_box(x, top, "url(#idle)", LIGHT["hatch"])
    yield draw_text(x + 21, top + 12, "idle", LIGHT["ink"], "start")
    x += 46
    if legend.reductions:
        yield draw_rectangle("reduction", x, top + 8, 16, STRIP, LIGHT["reduction"], REDUCTION_NAME)
        yield draw_text(x + 21, top + 12, REDUCTION_NAME, LIGHT["ink"], "start")
    if legend.communications:
        yield from _draw_communication_legend(top + LEGEND_LINE)


def _draw_communication_legend(top: float) -> Iterator[str]:
    """A line of its own: no picture has both reductions and communications, and the line above is full."""
    yield _legend_box(GUTTER, top, "url(#waiting)", LIGHT["waiting"])
    yield draw_text(GUTTER + 21, top + 12, "waiting for a communication", LIGHT["ink"], "start")
    words = "communication under way; a part is pale while the other has the rank"
    yield draw_rectangle("line", GUTTER + 178, top + 7, 16, LINE, LIGHT["communication"], words)
    yield draw_text(GUTTER + 199, top + 12, words, LIGHT["ink"], "start")


def _legend_box(x: float, top: float, fill: str, stroke: str) -> str:
    return f'<path d="M{x:.2f} {top:.2f}h16v16h-16z" fill="{fill}" stroke="{stroke}"/>'
