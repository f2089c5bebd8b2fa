"""When each action of a schedule ran: what a recorded run gives back, on one clock for all ranks."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, parse_action

MAX_RECORD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Span:
    """One action on one rank, from ``start`` to ``end`` in seconds."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of one step of a schedule."""

    spans: tuple[Span, ...]

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return 1 + max((span.rank for span in self.spans), default=-1)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    @property
    def bubble(self) -> float:
        """Idle share of makespan x ranks, between 0 and 1."""
        if not self.makespan:
            return 0.0
        busy = sum(span.end - span.start for span in self.spans)
        return 1.0 - busy / (self.makespan * self.ranks)


def dump_record(step: int, schedule: str, pipeline: int, rank: int, spans: Iterable[Span]) -> str:
    """Return one rank's spans of one training step as a line of JSON.

    ``pipeline`` is the global rank of the pipeline's first rank: it tells data-parallel pipelines apart.
    """
    rows = [[str(span.action), round(span.start, 6), round(span.end, 6)] for span in spans]
    return json.dumps({"step": step, "schedule": schedule, "pipeline": pipeline, "rank": rank, "spans": rows})


def load_record(directory: Path, step: int, pipeline: int = 0) -> Timeline:
    """Read one step of one pipeline from the ``timeline-rank*.jsonl`` files that ``--cf-record`` wrote.

    Raises `ScheduleError` where there is no such step or a file is not a record.
    """
    spans: list[Span] = []
    for path in sorted(Path(directory).glob("timeline-rank*.jsonl")):
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ScheduleError(f"{path}: larger than {MAX_RECORD_BYTES} bytes; not a recorded timeline")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                spans.extend(_parse_line(line, step, pipeline, f"{path}, line {number}"))
    if not spans:
        raise ScheduleError(f"{directory}: no recorded spans of step {step}, pipeline {pipeline}; record with --cf-record DIR")
    return Timeline(tuple(spans))


def _parse_line(line: str, step: int, pipeline: int, where: str) -> list[Span]:
    try:
        record = json.loads(line)
        if (record["step"], record["pipeline"]) != (step, pipeline):
            return []
        rank = int(record["rank"])
        return [Span(rank, parse_action(action), float(start), float(end)) for action, start, end in record["spans"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ScheduleError(f"{where}: not a recorded timeline: {error}") from error
