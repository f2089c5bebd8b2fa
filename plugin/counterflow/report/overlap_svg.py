"""A picture of profiled steps for papers: lanes as columns of time, each in the colours of what ran, and what was exposed."""

from collections.abc import Iterator, Sequence

import numpy as np

from counterflow.analysis.intervals import unite
from counterflow.analysis.overlap import Device
from counterflow.analysis.summary import summarize
from counterflow.analysis.trace import NONE
from counterflow.arrays import Array
from counterflow.errors import TraceError
from counterflow.report.colours import LIGHT
from counterflow.report.lanes import (
    EXPOSED,
    KERNEL_LEGEND,
    LEGEND,
    MOST_DEVICES,
    NAMES,
    Lane,
    check_size,
    choose_shade,
    find_offsets,
    list_lanes,
)
from counterflow.report.overlap_text import name_device
from counterflow.report.picture import choose_step, clean_text
from counterflow.report.shapes import draw_line, draw_rectangle, draw_text, open_document

GUTTER, PLOT, MARGIN, ROW, HEAD, FOOT = 170.0, 800, 14.0, 14.0, 26.0, 26.0
LEGEND_ROW = 36.0
COLUMNS, STEPS = 2 * PLOT, 6
COLUMN = PLOT / COLUMNS
WORDS = LEGEND | KERNEL_LEGEND


def render_findings_svg(devices: Sequence[Device]) -> str:
    """Return one picture of all devices on one time axis; raises `TraceError` for more than a picture can show."""
    if len(devices) > MOST_DEVICES:
        raise TraceError(f"{len(devices)} devices given; a picture shows at most {MOST_DEVICES}: give fewer traces")
    check_size(devices, "a picture")
    offsets, _ = find_offsets(devices)
    total = max(offset + device.window for device, offset in zip(devices, offsets, strict=True)) or 1
    parts, top = [], LEGEND_ROW + 8
    for device, offset in zip(devices, offsets, strict=True):
        lanes = list_lanes(device)
        parts += [*_draw_device(device, lanes, offset, total, top)]
        top += HEAD + ROW * len(lanes)
    parts += [*_draw_axis(total, top), *_draw_legend()]
    return "\n".join([open_document(GUTTER + PLOT + MARGIN, top + FOOT), *parts, "</svg>\n"])


def _draw_device(device: Device, lanes: Sequence[Lane], offset: int, total: int, top: float) -> Iterator[str]:
    yield draw_text(8, top + 12, clean_text(f"{name_device(device)}  {summarize(device)}"), LIGHT["ink"], "start")
    top += HEAD - 6
    left, right = offset / total * PLOT, (offset + device.window) / total * PLOT
    yield draw_rectangle("idle", GUTTER + left, top + 1, right - left, ROW - 2, LIGHT["idle"], "idle")
    for row, lane in enumerate(lanes):
        words = clean_text(f"{lane.title}, {lane.detail}" if lane.detail else lane.title)
        yield draw_text(GUTTER - 8, top + row * ROW + 10, words, LIGHT["muted"], "end")
        yield from _draw_lane(lane, offset, total, top + row * ROW)


def _draw_lane(lane: Lane, offset: int, total: int, top: float) -> Iterator[str]:
    """Draw columns in the shade that has most of each, as high as what runs in it; below, what of it is exposed."""
    shades = sorted({choose_shade(NAMES[kind]) for kind in np.unique(lane.kinds).tolist()})
    bounds = np.arange(COLUMNS + 1) * total // COLUMNS - offset
    covered = _cover_columns(lane, shades, bounds)
    exposed = choose_shade(NAMES[EXPOSED])
    others = np.array([place for place, shade in enumerate(shades) if shade != exposed], np.int64)
    if len(others):
        most = others[covered[others].argmax(axis=0)]
        filled = np.where(covered[others].any(axis=0), covered.sum(axis=0), 0)
        yield from _draw_columns(top, most, filled / np.diff(bounds), shades)
    if exposed in shades:
        place = np.full(COLUMNS, shades.index(exposed))
        yield from _draw_columns(top, place, covered[place[0]] / np.diff(bounds), shades)


def _cover_columns(lane: Lane, shades: list[str], bounds: Array) -> Array:
    """Return how long each shade runs in each column of time, int64[shades, columns]."""
    of_kind = np.array([shades.index(shade) if (shade := choose_shade(name)) in shades else NONE for name in NAMES])
    covered = np.zeros((len(shades), COLUMNS), np.int64)
    for place in range(len(shades)):
        own = of_kind[lane.kinds] == place
        covered[place] = unite(lane.start[own], lane.end[own]).overlap(bounds[:-1], bounds[1:])
    return covered


def _draw_columns(top: float, places: Array, shares: Array, shades: list[str]) -> Iterator[str]:
    """Draw neighbours of one shade and height as one; heights in steps, at least one where anything runs."""
    steps = np.ceil(np.minimum(shares, 1.0) * STEPS - 1e-9).astype(np.int64)
    first = np.flatnonzero(np.diff(places * (STEPS + 1) + steps, prepend=NONE))
    for start, end in zip(first.tolist(), [*first[1:].tolist(), COLUMNS], strict=True):
        if steps[start]:
            shade, height = shades[places[start]], (ROW - 2) * int(steps[start]) / STEPS
            left, width = GUTTER + start * COLUMN, (end - start) * COLUMN
            yield draw_rectangle(shade, left, top + ROW - 1 - height, width, height, LIGHT[shade], WORDS[shade])


def _draw_axis(total: int, top: float) -> Iterator[str]:
    length = total / 1e6
    step = choose_step(length, PLOT // 80)
    yield draw_line(GUTTER, top + 2, GUTTER + PLOT, top + 2, LIGHT["muted"])
    for n in range(int(length / step * (1 + 1e-9)) + 1):
        x = GUTTER + n * step / length * PLOT
        yield draw_line(x, top + 2, x, top + 6, LIGHT["muted"])
        yield draw_text(x, top + 17, f"{n * step:.9g}", LIGHT["muted"], "middle")
    yield draw_text(GUTTER - 8, top + 17, "ms", LIGHT["muted"], "end")


def _draw_legend() -> Iterator[str]:
    for row, words in enumerate((LEGEND, KERNEL_LEGEND)):
        x = 8.0
        for shade, text in words.items():
            yield draw_rectangle(shade, x, 6 + row * 16, 12, 10, LIGHT[shade], text)
            yield draw_text(x + 16, 14.5 + row * 16, text, LIGHT["ink"], "start")
            x += 26 + 5.2 * len(text)
