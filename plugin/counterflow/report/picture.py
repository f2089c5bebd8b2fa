"""What every rendering needs: one schedule with its times, which way its micro-batches go, and why its ranks idle."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from counterflow.errors import CounterflowError
from counterflow.report.colours import SINGLES
from counterflow.schedule.actions import Action
from counterflow.schedule.layouts import BIDIRECTIONAL
from counterflow.schedule.sharing import PairTimes, Sharing, find_sharing, sum_pairs
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import Span, Timeline

MAX_SPANS = 2_000_000
MAX_TITLE = 200
PAIR_COLUMNS = ("pairs", "time in pairs", "computation", "waiting", "communication hidden", "hidden share")
NO_REASON = "a recorded step does not say why"


@dataclass(frozen=True, slots=True)
class Idle:
    """A rank without work from ``start`` to ``end``, in the timeline's unit."""

    rank: int
    start: float
    end: float
    reason: str


@dataclass(frozen=True)
class Picture:
    """One schedule to draw: ``timeline`` is a simulation of ``table`` or a recorded step of it."""

    title: str
    table: ScheduleTable
    timeline: Timeline

    def split_ranks(self) -> list[list[Span]]:
        """Return the spans of each rank of the table, in order of time."""
        return self._split(self.timeline.spans)

    def split_reductions(self) -> list[list[Span]]:
        """Return the reductions of each rank of the table that take any time, in order of time."""
        return self._split(span for span in self.timeline.reductions if span.end > span.start)

    def _split(self, spans: Iterable[Span]) -> list[list[Span]]:
        rows: list[list[Span]] = [[] for _ in range(self.table.ranks)]
        for span in spans:
            rows[span.rank].append(span)
        for row in rows:
            row.sort(key=lambda span: (span.start, span.end))
        return rows

    def find_idle(self) -> list[list[Idle]]:
        """Return the idle spans of each rank: the simulation's with their reasons, or the gaps of a recorded step."""
        rows: list[list[Idle]] = [[] for _ in range(self.table.ranks)]
        for wait in self.timeline.waits:
            rows[wait.rank].append(Idle(wait.rank, wait.start, wait.end, wait.reason))
        return rows if self.timeline.waits else [list(self._list_gaps(*row)) for row in enumerate(self.split_ranks())]

    def _list_gaps(self, rank: int, row: list[Span]) -> Iterator[Idle]:
        free = 0.0
        for span in row:
            if span.start > free:
                yield Idle(rank, free, span.start, f"before {span.action}; {NO_REASON}")
            free = max(free, span.end)
        if self.timeline.makespan > free:
            yield Idle(rank, free, self.timeline.makespan, "nothing left to do")

    def split_sharing(self) -> list[list[Sharing]]:
        """Return the actions of each rank of which a record says how their parts shared it, in order of time; else empty rows."""
        rows: list[list[Sharing]] = [[] for _ in range(self.table.ranks)]
        for sharing in find_sharing(self.timeline):
            rows[sharing.span.rank].append(sharing)
        for row in rows:
            row.sort(key=lambda one: (one.span.start, one.span.end))
        return rows

    def find_direction(self, single: Action) -> str:
        """Return where the forward pass of a single action goes: ``up`` from rank 0 to P-1, or ``down``."""
        if self.table.layout.name == BIDIRECTIONAL:
            return "down" if single.microbatch >= self.table.microbatches // 2 else "up"
        first_of_pass = single.stage - single.stage % self.table.ranks
        return "up" if first_of_pass in self.table.layout.stages[0] else "down"

    def summarise(self) -> dict[str, str]:
        """Return the figures, written for a reader; peaks are those of the rank with the highest."""
        timeline = self.timeline
        figures = {
            "makespan": write_number(timeline.makespan),
            "bubble": f"{timeline.bubble:.1%}",
            "peak activations": write_number(max(timeline.peak_activations)),
            "peak queued": write_number(max(timeline.peak_queued)),
        }
        if timeline.peak_bytes:
            figures["peak bytes"] = write_bytes(max(timeline.peak_bytes))
        if pairs := sum_pairs(find_sharing(timeline)):
            figures["waiting in pairs"] = write_share(pairs.waiting, pairs.time)
            figures["communication hidden in pairs"] = write_share(pairs.hidden, pairs.hidden + pairs.waiting)
        return figures


@dataclass(frozen=True)
class Legend:
    """What occurs in some pictures: directions (up, down), kinds (F, B, I, W), overlapped pairs, reductions that take time.

    ``communications``: whether a record says how parts shared their rank.
    """

    directions: list[str]
    kinds: list[str]
    paired: bool
    reductions: bool
    communications: bool


def make_legend(pictures: Sequence[Picture]) -> Legend:
    """Return what a legend of the pictures has to explain."""
    actions = [(picture, span.action) for picture in pictures for span in picture.timeline.spans]
    found = {(picture.find_direction(single), single.kind) for picture, action in actions for single in action.singles()}
    directions = [way for way in ("up", "down") if any(way == direction for direction, _ in found)]
    kinds = [kind for kind in SINGLES if any(kind == other for _, other in found)]
    reductions = any(map(any, (picture.split_reductions() for picture in pictures)))
    communications = any(map(any, (picture.split_sharing() for picture in pictures)))
    return Legend(directions, kinds, any(action.parts for _, action in actions), reductions, communications)


def prepare_pictures(pictures: Sequence[Picture], limit: int, form: str) -> list[Picture]:
    """Return the pictures with titles that any rendering can hold, and times from 0 on: recorded steps do not start there.

    Raises `CounterflowError` for what ``form`` (in words) cannot show: nothing, too much, or times of another table.
    """
    if not pictures:
        raise CounterflowError(f"no picture given; {form} shows one or more: pass at least one Picture(title, table, timeline)")
    spans = sum(_count_spans(picture.timeline) for picture in pictures)
    if spans > limit:
        given = f"{spans:,} {_name_spans(pictures)} given; {form} shows at most {limit:,}"
        raise CounterflowError(f"{given}: draw fewer micro-batches, ranks or schedules at once")
    pictures = [replace(picture, title=clean_text(picture.title)) for picture in pictures]
    for picture in pictures:
        _check_picture(picture)
    return [_shift_to_zero(picture) for picture in pictures]


def _name_spans(pictures: Sequence[Picture]) -> str:
    return "spans and communications" if any(picture.timeline.communications for picture in pictures) else "spans"


def _count_spans(timeline: Timeline) -> int:
    return len(timeline.spans) + len(timeline.communications) + sum(len(turns.starts) for turns in timeline.turns)


def _check_picture(picture: Picture) -> None:
    title, spans, layout = picture.title, picture.timeline.spans, picture.table.layout
    if not spans:
        raise CounterflowError(f"picture {title!r} has no spans; at least one is needed: simulate the table or record a step")
    for span in spans:
        if not (math.isfinite(span.start) and math.isfinite(span.end) and span.start <= span.end):
            raise CounterflowError(
                f"picture {title!r}: {span.action} of rank {span.rank} runs from {span.start} to {span.end}; "
                "allowed are finite times in order: record or simulate again"
            )
        if span.rank >= layout.ranks or any(single.stage > layout.last_stage for single in span.action.singles()):
            raise CounterflowError(
                f"picture {title!r}: {span.action} on rank {span.rank} given; the table has {layout.ranks} ranks and stages "
                f"0 to {layout.last_stage}: pass the table that these times belong to"
            )


def clean_text(text: str) -> str:
    """Return the text in characters that any rendering can hold (no terminal codes, valid in XML), shortened."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= MAX_TITLE else text[: MAX_TITLE - 1] + "…"


def _shift_to_zero(picture: Picture) -> Picture:
    timeline = picture.timeline
    origin = min(span.start for span in timeline.spans)
    if origin == 0:
        return picture
    spans = tuple(replace(span, start=span.start - origin, end=span.end - origin) for span in timeline.spans)
    waits = tuple(replace(wait, start=wait.start - origin, end=wait.end - origin) for wait in timeline.waits)
    reductions = tuple(replace(span, start=span.start - origin, end=span.end - origin) for span in timeline.reductions)
    communications = tuple(
        replace(
            one,
            issued=one.issued - origin,
            waited=one.waited - origin,
            end=one.end - origin,
            complete=None if one.complete is None else one.complete - origin,
        )
        for one in timeline.communications
    )
    turns = tuple(replace(one, starts=tuple(start - origin for start in one.starts)) for one in timeline.turns)
    shifted = replace(timeline, spans=spans, waits=waits, reductions=reductions, communications=communications, turns=turns)
    return replace(picture, timeline=shifted)


def write_number(value: float) -> str:
    """Return five significant digits, without exponent and trailing zeros."""
    digits = 0 if value == 0 else max(0, 4 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def write_share(part: float, whole: float) -> str:
    """Return a part of a whole in percent, a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "–"


def list_pair_times(pairs: PairTimes | None) -> list[str]:
    """Return what the pairs of a rank did, in words beside `PAIR_COLUMNS`; "" where there are none."""
    if pairs is None:
        return [""] * len(PAIR_COLUMNS)
    times = (pairs.time, pairs.computation, pairs.waiting, pairs.hidden)
    return [str(pairs.pairs), *map(write_number, times), write_share(pairs.hidden, pairs.hidden + pairs.waiting)]


def write_bytes(count: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{write_number(count)} {unit}"
        count /= 1024
    return f"{write_number(count)} TiB"


def choose_step(total: float, most: int) -> float:
    """Return the distance of axis ticks, 1, 2 or 5 times a power of ten, so that ``total`` has at most ``most`` of them."""
    least = total / max(most, 1)
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)
