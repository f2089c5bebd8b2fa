"""When each action of a schedule ran: what a simulation predicts and what a recorded run gives back."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import PAIR, REDUCTION, Action, parse_action

MAX_RECORD_BYTES = 2**30
MAX_LINE_BYTES = 64 * 2**20
# Seconds; beyond, sums of them are no numbers any more.
LARGEST_TIME = 1e30
# How an action changes its rank's (live activations, queued weight gradients); an F as it starts, the others as they end.
HELD_AFTER = {"F": (1, 0), "B": (-1, 0), "I": (-1, 1), "W": (0, -1), "R": (0, 0)}


@dataclass(frozen=True, slots=True)
class Span:
    """One action on one rank, from ``start`` to ``end`` (seconds where recorded, the costs' unit where simulated)."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Communication:
    """One communication of an F or B in its rank's own time: ``issued``, waited for from ``waited`` to ``end``.

    Recorded under ``--cf-overlap``. Where the action is part of a pair, the rank computes the other part between ``issued`` and
    ``waited``. The transfer was ``complete`` at a time that is known of torch's own transfers; of others it is None.
    """

    rank: int
    action: Action
    issued: float
    waited: float
    end: float
    complete: float | None = None


@dataclass(frozen=True, slots=True)
class Turns:
    """When one of a pair's parts got its rank: the B at the first of the ``starts``, the F at the second, and so on in turn."""

    rank: int
    action: Action
    starts: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """An idle span of one rank before ``action``, and why.

    ``for_input``: the result of ``source``, an F, I or B of ``other_rank``, is still to come. Otherwise, where ranks stop for
    transfers, ``other_rank`` is still to take the result of ``source``. The last ``transfer`` of the time the
    result is on its way. After a rank's last action all three are None.
    """

    rank: int
    start: float
    end: float
    action: Action | None = None
    source: Action | None = None
    other_rank: int | None = None
    transfer: float = 0.0
    for_input: bool = True

    @property
    def reason(self) -> str:
        """One line for a reader."""
        if self.source is None:
            return "nothing left to do"
        waits = f"{self.action} waits" if self.action else "waits"
        late = f"for {self.source} of rank {self.other_rank}"
        if not self.for_input:
            late = f"until rank {self.other_rank} has taken {self.source}"
        return f"{waits} {late}" + (f", {self.transfer:g} of it in transfer" if self.transfer else "")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a rank holds from ``time`` on, in micro-batches of 1/P of the model.

    ``activations`` of forwards whose input gradient is still to come; ``queued`` of those whose weight gradient is.
    """

    time: float
    activations: float
    queued: float


@dataclass(frozen=True)
class Timeline:
    """The spans of one step of a schedule, each rank's in order; ``waits`` where simulated.

    ``peak_bytes`` per rank where sizes were given. ``reductions``, where simulated, run beside the spans: they keep no rank from
    computing, and count for the makespan only. ``communications`` of parts and ``turns`` of pairs are recorded under
    ``--cf-overlap``.
    """

    spans: tuple[Span, ...]
    waits: tuple[Wait, ...] = ()
    peak_bytes: tuple[float, ...] | None = None
    reductions: tuple[Span, ...] = ()
    communications: tuple[Communication, ...] = ()
    turns: tuple[Turns, ...] = ()

    @cached_property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return 1 + max((span.rank for span in self.spans), default=-1)

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans + self.reductions) - min(span.start for span in self.spans)

    @property
    def bubble(self) -> float:
        """Idle share of makespan x ranks, between 0 and 1."""
        if not self.makespan:
            return 0.0
        busy = sum(span.end - span.start for span in self.spans)
        return 1.0 - busy / (self.makespan * self.ranks)

    @cached_property
    def memory(self) -> tuple[tuple[Memory, ...], ...]:
        """What each rank holds over time: an entry for each change, in order."""
        stages = 1 + max((single.stage for span in self.spans for single in span.action.singles()), default=0)
        share = self.ranks / stages
        rows: list[list[Memory]] = [[] for _ in range(self.ranks)]
        counts = [[0, 0] for _ in range(self.ranks)]
        for span in self.spans:
            row, held = rows[span.rank], counts[span.rank]
            for time, kinds in ((span.start, "F"), (span.end, "BIW")):
                for kind in (single.kind for single in span.action.singles() if single.kind in kinds):
                    activations, queued = HELD_AFTER[kind]
                    held[0] += activations
                    held[1] += queued
                    row.append(Memory(time, held[0] * share, held[1] * share))
        return tuple(map(tuple, rows))

    @cached_property
    def peak_activations(self) -> tuple[float, ...]:
        """The most live activations of each rank, in micro-batches of 1/P of the model."""
        return tuple(max((held.activations for held in row), default=0.0) for row in self.memory)

    @cached_property
    def peak_queued(self) -> tuple[float, ...]:
        """The most queued weight gradients of each rank, in micro-batches of 1/P of the model."""
        return tuple(max((held.queued for held in row), default=0.0) for row in self.memory)


def dump_record(
    step: int,
    schedule: str,
    pipeline: int,
    rank: int,
    spans: Iterable[Span],
    communications: Iterable[Communication] = (),
    turns: Iterable[Turns] = (),
) -> str:
    """Return one rank's spans of one training step, by the trainer's number, as a line of JSON.

    ``pipeline`` is the global rank of the pipeline's first rank: it tells data-parallel pipelines apart.
    """
    rows = [[str(span.action), round(span.start, 6), round(span.end, 6)] for span in spans]
    record = {"step": step, "schedule": schedule, "pipeline": pipeline, "rank": rank, "spans": rows}
    if found := [_dump_communication(one) for one in communications]:
        record["communications"] = found
    if changed := [[str(one.action), *(round(start, 6) for start in one.starts)] for one in turns]:
        record["turns"] = changed
    return json.dumps(record)


def _dump_communication(one: Communication) -> list[str | float]:
    times = (one.issued, one.waited, one.end) + (() if one.complete is None else (one.complete,))
    return [str(one.action), *(round(time, 6) for time in times)]


def load_record(directory: Path, step: int, pipeline: int = 0) -> Timeline:
    """Read one step of one pipeline from the ``timeline-rank*.jsonl`` files that ``--cf-record`` wrote.

    Of a step that a rank recorded twice, as after a resume or where the trainer ran it again, the later counts. Raises
    `ScheduleError` where there is no such step or a file is not a record.
    """
    rows: dict[int, list[Span]] = {}
    communications: dict[int, list[Communication]] = {}
    turns: dict[int, list[Turns]] = {}
    for path in _list_files(directory):
        # Of one rank, which may have had another place in the pipeline before a resume.
        last = None
        for record, where in _read_lines(path):
            last = (record, where) if record["step"] == step else last
        if last is not None and last[0]["pipeline"] == pipeline:
            rank, spans = _parse_spans(*last)
            rows[rank], communications[rank], turns[rank] = spans, _parse_communications(*last), _parse_turns(*last)
    if not any(rows.values()):
        raise ScheduleError(f"{directory}: no recorded spans of step {step}, pipeline {pipeline}; record with --cf-record DIR")
    return Timeline(
        tuple(span for rank in sorted(rows) for span in rows[rank]),
        communications=tuple(one for rank in sorted(rows) for one in communications[rank]),
        turns=tuple(one for rank in sorted(rows) for one in turns[rank]),
    )


def find_last_step(directory: Path, pipeline: int = 0) -> int:
    """Return the last step that every recorded rank of the pipeline has; raises `ScheduleError` where there is none."""
    steps: dict[int, set[int]] = {}
    for path in _list_files(directory):
        places = {record["step"]: (record["pipeline"], record["rank"]) for record, _ in _read_lines(path)}
        for step, (other, rank) in places.items():
            if other == pipeline:
                steps.setdefault(rank, set()).add(step)
    common = set.intersection(*steps.values()) if steps else set()
    if not common:
        raise ScheduleError(f"{directory}: no recorded step of pipeline {pipeline}; record with --cf-record DIR")
    return max(common)


def _list_files(directory: Path) -> list[Path]:
    with _refuse_unreadable(directory):
        return sorted(Path(directory).glob("timeline-rank*.jsonl"))


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each line of one rank's file as written by `dump_record`, and where it is; not one that a kill left unfinished."""
    with _refuse_unreadable(path):
        if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
            raise ScheduleError(f"{path}: no file of at most {MAX_RECORD_BYTES} bytes; not a recorded timeline")
        with path.open("rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    return
                yield _parse_line(line, f"{path}, line {number}"), f"{path}, line {number}"


@contextmanager
def _refuse_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    # A name that nothing can have is a ValueError.
    except (OSError, ValueError) as error:
        if isinstance(error, ScheduleError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ScheduleError(f"{path}: cannot be read as a record: {reason}") from error


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        for key in ("step", "pipeline", "rank"):
            if type(record[key]) is not int or record[key] < 0:
                raise ValueError("step, pipeline and rank are to be whole numbers from 0 up")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ScheduleError(f"{where}: not a recorded timeline: {_describe(error)}") from error
    return dict(record)


def _parse_spans(record: dict[str, Any], where: str) -> tuple[int, list[Span]]:
    rank = record["rank"]
    with _refuse_misshapen(where):
        spans = [Span(rank, parse_action(action), float(start), float(end)) for action, start, end in record["spans"]]
        for span in spans:
            if span.action.kind == REDUCTION:
                raise ValueError(f"{span.action}, and reductions are not recorded")
            if not -LARGEST_TIME <= span.start <= span.end <= LARGEST_TIME:
                raise ValueError(f"{span.action} from {span.start} to {span.end}, which is no time")
    return rank, spans


def _parse_communications(record: dict[str, Any], where: str) -> list[Communication]:
    with _refuse_misshapen(where):
        rows = record.get("communications", [])
        return [_parse_communication(record["rank"], parse_action(action), *map(float, times)) for action, *times in rows]


def _parse_communication(
    rank: int, action: Action, issued: float, waited: float, end: float, complete: float | None = None
) -> Communication:
    _require_order(f"a communication of {action}", issued, waited, end)
    if complete is not None:
        _require_order(f"a communication of {action}", issued, complete, end)
    return Communication(rank, action, issued, waited, end, complete)


def _parse_turns(record: dict[str, Any], where: str) -> list[Turns]:
    """Return the turns of a line, none where it is of a version without them."""
    with _refuse_misshapen(where):
        rows = record.get("turns", [])
        found = [Turns(record["rank"], parse_action(action), tuple(map(float, starts))) for action, *starts in rows]
        for one in found:
            if one.action.kind != PAIR:
                raise ValueError(f"turns of {one.action}, which is no pair")
            _require_order(f"turns of {one.action}", *one.starts)
    return found


def _require_order(what: str, *times: float) -> None:
    if not all(one <= other for one, other in pairwise((-LARGEST_TIME, *times, LARGEST_TIME))):
        raise ValueError(f"{what} at {', '.join(f'{time:g}' for time in times[:4])}, which are no times in order")


@contextmanager
def _refuse_misshapen(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ScheduleError(f"{where}: not a recorded timeline: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
