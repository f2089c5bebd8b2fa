"""The interactive page: one HTML file without network, its data as arrays in one JSON element."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from counterflow.report import colours
from counterflow.report.filling import fill_page
from counterflow.report.picture import (
    MAX_SPANS,
    PAIR_COLUMNS,
    Picture,
    list_pair_times,
    make_legend,
    prepare_pictures,
    write_number,
)
from counterflow.schedule.actions import PAIR, Action
from counterflow.schedule.layouts import BIDIRECTIONAL
from counterflow.schedule.sharing import Sharing, sum_pairs


def render_html(pictures: Sequence[Picture]) -> str:
    """Return one self-contained page: a timeline, or several compared on one time axis.

    Raises `CounterflowError` for no picture, one without spans, or more than 2,000,000 spans in all.
    """
    pictures = prepare_pictures(pictures, MAX_SPANS, "the page")
    legend = make_legend(pictures)
    return fill_page(
        "page",
        "page",
        {"pictures": [encode_picture(picture) for picture in pictures]},
        title=" / ".join(picture.title for picture in pictures),
        pictures=[_describe(picture) for picture in pictures],
        figures=list(dict.fromkeys(name for picture in pictures for name in picture.summarise())),
        directions=[(way, colours.DIRECTION_NAMES[way]) for way in legend.directions],
        kinds=[(kind, colours.KIND_NAMES[kind], colours.choose_text_colour(kind)) for kind in legend.kinds],
        paired=legend.paired,
        reductions=colours.REDUCTION_NAME if legend.reductions else None,
        communications=legend.communications,
    )


def encode_picture(picture: Picture) -> dict[str, Any]:
    """Return what the page's script draws of a prepared picture, column by column and rank by rank.

    ``rows``: kinds as one string (X for an overlapped pair), starts, lengths, stages, micro-batches; the B's of pairs
    in order in ``backStages`` and ``backMicrobatches``. ``idle``: starts, lengths, reasons. ``reductions``: starts, lengths,
    stages. ``sharing``: of recorded communications, what each rank computed, what was under way, where it waited; the actions'
    waits and hidden times. ``memory``: levels from each time on.
    """
    table, timeline = picture.table, picture.timeline
    # Seven digits of the makespan: far below a pixel at any zoom, a third of the size.
    digits = 7 - math.ceil(math.log10(timeline.makespan)) if timeline.makespan else 6

    def trim(time: float) -> float:
        return round(time, digits)

    rows = []
    for row in picture.split_ranks():
        backs = [span.action.parts[1] for span in row if span.action.parts]
        rows.append(
            {
                "kinds": "".join("X" if span.action.kind == PAIR else span.action.kind for span in row),
                "starts": [trim(span.start) for span in row],
                "lengths": [trim(span.end - span.start) for span in row],
                "stages": [span.action.stage for span in row],
                "microbatches": [span.action.microbatch for span in row],
                "backStages": [back.stage for back in backs],
                "backMicrobatches": [back.microbatch for back in backs],
            }
        )
    idle = [
        {
            "starts": [trim(gap.start) for gap in gaps],
            "lengths": [trim(gap.end - gap.start) for gap in gaps],
            "reasons": [gap.reason for gap in gaps],
        }
        for gaps in picture.find_idle()
    ]
    bidirectional = table.layout.name == BIDIRECTIONAL
    forwards = [Action("F", stage, 0) for stage in range(table.layout.last_stage + 1)]
    return {
        "title": picture.title,
        "microbatches": table.microbatches,
        "makespan": timeline.makespan,
        # The first micro-batch that goes down, where the micro-batch says the direction; else the stage does.
        "firstDown": table.microbatches // 2 if bidirectional else None,
        "stagesDown": [int(picture.find_direction(forward) == "down") for forward in forwards],
        "rows": rows,
        "idle": idle,
        "reductions": [
            {
                "starts": [trim(span.start) for span in spans],
                "lengths": [trim(span.end - span.start) for span in spans],
                "stages": [span.action.stage for span in spans],
            }
            for spans in picture.split_reductions()
        ],
        "sharing": [_encode_sharing(row, digits) for row in picture.split_sharing()],
        "memory": [_encode_levels(picture, rank, digits) for rank in range(table.ranks)],
        "peakActivations": _pad(timeline.peak_activations, table.ranks),
        "peakQueued": _pad(timeline.peak_queued, table.ranks),
    }


def _encode_sharing(row: Sequence[Sharing], digits: int) -> dict[str, Any]:
    """Return a rank's intervals in order of their starts; ``parts`` says whose they are: 1 is the B of a pair, 0 is any other."""

    def encode(found: Iterable[tuple[float, float, int]]) -> dict[str, Any]:
        ordered = sorted(found)
        return {
            "starts": [round(start, digits) for start, _, _ in ordered],
            "lengths": [round(end - start, digits) for start, end, _ in ordered],
            "parts": [part for _, _, part in ordered],
        }

    def gather(name: str) -> Iterable[tuple[float, float, int]]:
        return ((*one, n) for sharing in row for n, part in enumerate(sharing.parts) for one in getattr(part, name))

    return {
        "starts": [round(sharing.span.start, digits) for sharing in row],
        "waiting": [round(sharing.waiting, digits) for sharing in row],
        "hidden": [round(sharing.hidden, digits) for sharing in row],
        "computes": encode(gather("computes")),
        "underWay": encode(gather("under_way")),
        "waits": encode(gather("waits")),
    }


def _encode_levels(picture: Picture, rank: int, digits: int) -> dict[str, list[float]]:
    # The last of several changes at one time is the level that lasts.
    changes = picture.timeline.memory[rank] if rank < picture.timeline.ranks else ()
    levels = {round(held.time, digits): (held.activations, held.queued) for held in changes}
    return {
        "times": list(levels),
        "activations": [activations for activations, _ in levels.values()],
        "queued": [queued for _, queued in levels.values()],
    }


def _pad(values: Sequence[float], ranks: int) -> list[float]:
    # A record may lack the last ranks.
    return [*values, *[0.0] * (ranks - len(values))]


def _describe(picture: Picture) -> dict[str, Any]:
    """Return the words and figures of a picture's part of the page."""
    table, timeline = picture.table, picture.timeline
    busy = [sum(span.end - span.start for span in row) for row in picture.split_ranks()]
    sharing = picture.split_sharing()
    paired = [list_pair_times(sum_pairs(row)) for row in sharing]
    columns = [busy, [timeline.makespan - time for time in busy], timeline.peak_activations, timeline.peak_queued]
    return {
        "title": picture.title,
        "size": f"{table.ranks} ranks, {table.microbatches} micro-batches, {table.layout.name} layout",
        "summary": picture.summarise(),
        "columns": ["rank", "busy", "idle", "peak activations", "peak queued"],
        "ranks": [[rank, *map(write_number, row)] for rank, row in enumerate(zip(*columns, strict=False))],
        "pair_columns": ["rank", *PAIR_COLUMNS],
        "pairs": [[rank, *row] for rank, row in enumerate(paired)] if any(map(any, paired)) else [],
    }
