"""Record when each action ran, for ``--cf-record DIR`` and to measure the costs of actions.

A span starts when the action's first input has arrived, so waiting shows as idle time, as in a simulated timeline. On a CPU
times are read from the host's clock. On a GPU the host only issues work, so CUDA events are recorded and read after the step
(untested on GPU).
"""

import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from counterflow.devices import make_event, wait_for_device
from counterflow.errors import OptionError
from counterflow.schedule.actions import Action
from counterflow.schedule.timeline import Communication, Span, Turns, dump_record


@dataclass
class Arrivals:
    """When the transfers of one communication were complete: a mark each, where they can tell."""

    expected: int
    marks: list[Any] = field(default_factory=list)


class Recorder:
    """Collects the spans of one rank; ``rank`` is its place among the pipeline's ranks.

    ``offset`` is added to all times: the seconds that turn this host's clock into one that all hosts share.
    """

    def __init__(self, rank: int, use_cuda_events: bool, offset: float = 0.0) -> None:
        self._rank = rank
        self._use_cuda_events, self._offset = use_cuda_events, offset
        self._marks: list[tuple[Action, Any, Any]] = []
        self._communications: list[tuple[Action, tuple[Any, Any, Any], Arrivals]] = []
        self._turns: list[tuple[Action, list[Any]]] = []
        self._changes: list[Any] = []
        self._action: Action | None = None
        self._begin: Any = None
        self._base: tuple[float, Any] | None = None

    def mark(self) -> Any:
        """Return a mark at this point of the rank's work, for `note`."""
        if not self._use_cuda_events:
            return time.monotonic()
        event = make_event(timed=True)
        event.record()
        return event

    def start(self, action: Action) -> None:
        """Begin an action."""
        if self._base is None and self._use_cuda_events:
            wait_for_device()
            self._base = (time.monotonic(), self.mark())
        self._action, self._begin, self._changes = action, None, []

    def begin_compute(self) -> None:
        """Begin the action's span: its input has arrived (in a pair, the first part's)."""
        if self._begin is None:
            self._begin = self.mark()

    def stop(self) -> None:
        """End the action's span. An R, which runs beside later actions, has none."""
        if self._action is not None and self._begin is not None:
            self._marks.append((self._action, self._begin, self.mark()))
            if self._changes:
                self._turns.append((self._action, self._changes))
        self._action = None

    def change_turn(self) -> None:
        """The rank goes to the other part of the running pair; first to its B."""
        self._changes.append(self.mark())

    def watch(self, handle: Any) -> Arrivals:
        """Return what gets a mark when each of the transfers is complete that ``handle`` stands for; others cannot tell.

        On a GPU torch calls back at once, on a stream that has waited for the transfer (untested on GPU).
        """
        works = handle if isinstance(handle, list) and handle else [handle]
        arrivals = Arrivals(len(works))
        for work in works:
            if isinstance(work, dist.Work):
                try:
                    work.get_future().add_done_callback(lambda _: arrivals.marks.append(self.mark()))
                # Not every backend's transfers have a future.
                except RuntimeError:
                    break
        return arrivals

    def note(self, action: Action, issued: Any, resumed: Any, arrivals: Arrivals) -> None:
        """A communication of the action has ended; it was ``issued``, and waited for from ``resumed`` on."""
        self._communications.append((action, (issued, resumed, self.mark()), arrivals))

    def _seconds(self, mark: Any) -> float:
        if self._base is None:
            return float(mark) + self._offset
        host, event = self._base
        return float(host + event.elapsed_time(mark) / 1000.0) + self._offset

    def take_spans(self) -> list[Span]:
        """Return the spans of one step, in seconds of the common clock, and forget them."""
        if self._use_cuda_events:
            wait_for_device()
        spans = [Span(self._rank, action, self._seconds(b), self._seconds(e)) for action, b, e in self._marks]
        self._marks.clear()
        return spans

    def take_communications(self) -> list[Communication]:
        """Return the communications of one step, in the order of their ends, and forget them; call it before `take_spans`."""
        if self._use_cuda_events:
            wait_for_device()
        found = []
        for action, marks, arrivals in self._communications:
            # A part may have changed its stream meanwhile; the order is the host's.
            issued, waited, end = accumulate(map(self._seconds, marks), max)
            complete = None
            if len(arrivals.marks) == arrivals.expected:
                # The thread that says so may come late.
                complete = min(max(issued, *map(self._seconds, arrivals.marks)), end)
            found.append(Communication(self._rank, action, issued, waited, end, complete))
        self._communications.clear()
        return found

    def take_turns(self) -> list[Turns]:
        """Return the turns of one step's pairs and forget them; call it before `take_spans`."""
        if self._use_cuda_events:
            wait_for_device()
        found = [Turns(self._rank, pair, tuple(accumulate(map(self._seconds, marks), max))) for pair, marks in self._turns]
        self._turns.clear()
        return found


def check_folder(option: str, directory: Path) -> None:
    """Make the folder that an option names and write a file in it; raises `OptionError` if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(
            f"{option} {directory} cannot be written: {reason}; give a folder that can be made and written"
        ) from None


def append_record(
    directory: Path,
    pipeline_ranks: list[int],
    rank: int,
    step: int,
    schedule: str,
    spans: list[Span],
    communications: Sequence[Communication] = (),
    turns: Sequence[Turns] = (),
) -> None:
    """Append what one rank recorded of a step, as a line, to ``DIR/timeline-rank<global rank>.jsonl``.

    ``step`` is the trainer's number. A step that is recorded again, after a resume, gets a second line, and the last line counts.
    ``pipeline_ranks`` are the global ranks of the pipeline, ``rank`` is this rank's place among them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    line = dump_record(step, schedule, pipeline_ranks[0], rank, spans, communications, turns)
    with (directory / f"timeline-rank{pipeline_ranks[rank]:05d}.jsonl").open("a+b") as file:
        _drop_unfinished_line(file)
        file.write(line.encode() + b"\n")


def _drop_unfinished_line(file: IO[bytes]) -> None:
    """Remove a last line without an end, which a killed run leaves."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
