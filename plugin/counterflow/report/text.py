"""A schedule as lines of text: one per rank, time from left to right."""

import bisect
import io
import itertools
import math
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from counterflow.errors import CounterflowError
from counterflow.report.colours import KIND_NAMES, LIGHT, choose_text_colour
from counterflow.report.picture import MAX_SPANS, Picture, choose_step, make_legend, prepare_pictures, write_number
from counterflow.schedule.actions import Action
from counterflow.schedule.timeline import Span

LEAST_WIDTH, MOST_WIDTH = 40, 1000
IDLE, PAIR, REDUCTION = "·", "X", "="

Cell = tuple[str, str]  # a character and its style


def render_text(picture: Picture, width: int = 100, colour: bool = False) -> str:
    """Return title, figures, one line of ``width`` characters per rank, a time axis and a legend; ANSI colours if wanted.

    Actions show their micro-batch where every action of the picture has room for it; otherwise each character is what
    the rank does in the middle of that character's time. Upper case flows up (rank 0 to last), lower case down. Raises
    `CounterflowError` for a picture without spans and for a width outside 40 to 1000.
    """
    picture = prepare_pictures([picture], MAX_SPANS, "a terminal")[0]
    if not LEAST_WIDTH <= width <= MOST_WIDTH:
        raise CounterflowError(f"width {width} given; allowed are {LEAST_WIDTH} to {MOST_WIDTH} characters")
    margin = len(f"rank {picture.table.ranks - 1} ")
    cells = width - margin
    rows, reductions = picture.split_ranks(), picture.split_reductions()
    numbered = all(_fits(picture, span, cells) for row in rows for span in row)
    lines = [Text(picture.title, style="bold"), Text(_write_figures(picture))]
    for rank, row in enumerate(rows):
        drawn = _draw_numbered(picture, row, cells) if numbered else _draw_letters(picture, row, cells)
        _draw_reductions(picture, reductions[rank], drawn)
        lines.append(Text(f"rank {rank}".ljust(margin)) + _join(drawn))
    lines.append(Text(" " * margin + _draw_axis(picture.timeline.makespan, cells), style="dim"))
    lines.append(Text(_write_legend(picture, numbered), style="dim"))
    return _print(lines, width, colour)


def _write_figures(picture: Picture) -> str:
    return "  ".join(f"{name} {value}" for name, value in picture.summarise().items())


def _locate(picture: Picture, time: float, cells: int) -> int:
    """Return the cell whose left edge is nearest to a time."""
    makespan = picture.timeline.makespan or 1.0
    return round(time / makespan * cells)


def _fits(picture: Picture, span: Span, cells: int) -> bool:
    room = _locate(picture, span.end, cells) - _locate(picture, span.start, cells)
    return room > sum(len(_label(picture, part)) for part in span.action.singles())


def _draw_numbered(picture: Picture, row: list[Span], cells: int) -> list[Cell]:
    """Labels like F3, filled up to the action's end with dashes; the F and the B of a pair share its cells."""
    drawn: list[Cell] = [(IDLE, "dim")] * cells
    for span in row:
        start, end = _locate(picture, span.start, cells), _locate(picture, span.end, cells)
        block: list[Cell] = []
        for part in span.action.singles():
            block += [(char, _style(picture, part)) for char in _label(picture, part)]
        # The last cell stays apart from the next label.
        block += [("-", block[-1][1])] * (end - start - len(block))
        drawn[start:end] = block
    return drawn


def _draw_letters(picture: Picture, row: list[Span], cells: int) -> list[Cell]:
    step = picture.timeline.makespan / cells
    starts = [span.start for span in row]
    drawn = []
    for cell in range(cells):
        middle = (cell + 0.5) * step
        n = bisect.bisect_right(starts, middle) - 1
        busy = n >= 0 and middle < row[n].end
        drawn.append(_letter(picture, row[n].action) if busy else (IDLE, "dim"))
    return drawn


def _draw_reductions(picture: Picture, row: list[Span], drawn: list[Cell]) -> None:
    """Mark the idle cells in whose middle a reduction runs."""
    step = picture.timeline.makespan / len(drawn)
    for span in row:
        for cell in range(math.ceil(span.start / step - 0.5), min(math.ceil(span.end / step - 0.5), len(drawn))):
            if drawn[cell][0] == IDLE:
                drawn[cell] = (REDUCTION, LIGHT["reduction"])


def _letter(picture: Picture, action: Action) -> Cell:
    first = next(action.singles())
    letter = PAIR if action.parts else action.kind
    if picture.find_direction(first) == "down":
        letter = letter.lower()
    return letter, _style(picture, first) + (" bold underline" if action.parts else "")


def _label(picture: Picture, single: Action) -> str:
    kind = single.kind.lower() if picture.find_direction(single) == "down" else single.kind
    return f"{kind}{single.microbatch}"


def _style(picture: Picture, single: Action) -> str:
    way = picture.find_direction(single)
    return f"{choose_text_colour(single.kind)} on {LIGHT[f'{way}-{single.kind}']}"


def _join(drawn: list[Cell]) -> Text:
    line = Text()
    for style, run in itertools.groupby(drawn, key=lambda cell: cell[1]):
        line.append("".join(char for char, _ in run), style)
    return line


def _draw_axis(makespan: float, cells: int) -> str:
    """Return ticks with their times, ``|`` at the time itself."""
    step = choose_step(makespan, max(1, cells // 10))
    line = " " * cells
    for n in range(int(makespan / step * (1 + 1e-9)) + 1):
        cell, label = round(n * step / makespan * cells) if makespan else 0, "|" + write_number(n * step)
        if cell + len(label) <= cells:
            line = line[:cell] + label + line[cell + len(label) :]
    return line


def _write_legend(picture: Picture, numbered: bool) -> str:
    legend = make_legend([picture])
    words = [f"{kind} {KIND_NAMES[kind]}" for kind in legend.kinds]
    if legend.paired:
        words.append("F and B together: overlapped" if numbered else f"{PAIR} overlapped F and B")
    words.append(f"{IDLE} idle")
    if legend.reductions:
        words.append(f"{REDUCTION} idle, a gradient reduction runs")
    if "down" in legend.directions:
        words.append("upper case: up (rank 0 to last), lower case: down")
    return ", ".join(words)


def _print(lines: list[Text], width: int, colour: bool) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    for line in _wrap(lines, width):
        console.print(line, no_wrap=True, overflow="ignore", crop=False, highlight=False, emoji=False)
    return stream.getvalue()


def _wrap(lines: list[Text], width: int) -> Iterator[Text]:
    console = Console(width=width, file=io.StringIO())
    for line in lines:
        yield from line.wrap(console, width) if len(line) > width else [line]
