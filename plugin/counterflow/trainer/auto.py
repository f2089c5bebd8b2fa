"""``--cf-schedule auto``: measure what actions cost in the first steps, search a table for them, and use it.

The model is laid out as a V, two chunks a rank. A first step warms up, the next ones are measured, under a family whose
backward passes are split. Then global rank 0 takes the costs of its pipeline and starts a search in a process of its own
(`counterflow.schedule.search_process`); training goes on under a family meanwhile.

All ranks must change tables at the same step, and only rank 0 can see when the search has ended. So while one is open, rank 0
tells at the begin of each step how it stands: a broadcast of one number, started then and waited for at the begin of the step
after. It runs beside a whole step, so nobody waits for it, and as every rank takes part in every one of these broadcasts, all
know the same at the same step, however far ahead of the others a rank is. (On a GPU, to read the number the host waits for what
it has issued, which a trainer does in each step anyway, to read its loss.) A table that was found is sent in the step in which
all know of it, and is used from that step on. Evaluation does not count as a step here.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.schedule import Costs, ScheduleTable, Span, Timeline, build, from_csv, to_csv
from counterflow.schedule.comparison import estimate_costs
from counterflow.schedule.search_process import Answer, SearchProcess, Task
from counterflow.trainer.tables import AUTO_FAMILY, AUTO_FAMILY_WITH_PAIRS, prepare_table

# What the first steps run; the first of them warms up.
MEASURED = (AUTO_FAMILY.name,) * 3
MEASURED_PAIRS = (AUTO_FAMILY_WITH_PAIRS.name,) * 2
SEARCH_SECONDS = 10.0
# How much shorter than the family's a step must be for another table to be worth it.
LEAST_GAIN = 0.001
SEARCHING, FOUND, NOTHING = range(3)


@dataclass
class _Search:
    """A search that is open, for a number of micro-batches; what rank 0 says of it is on its way to all."""

    microbatches: int
    state: torch.Tensor
    telling: dist.Work | None = None


class AutoTable:
    """Which table ``auto`` runs now; every rank of every pipeline makes the same calls.

    ``has_pairs``: pairs overlap (``--cf-overlap``), so theirs is measured too. ``splits``: an I leaves work to its W.
    """

    def __init__(self, pp_group: Any, device: torch.device, *, has_pairs: bool, splits: bool) -> None:
        self._group, self._ranks, self._device, self._splits = pp_group, pp_group.size(), device, splits
        self._plan = MEASURED + (MEASURED_PAIRS if has_pairs else ())
        self._steps: list[list[Span]] = []
        self._tables: dict[int, ScheduleTable] = {}
        self._searched: set[int] = set()
        self._search: _Search | None = None
        # Of these rank 0 alone knows.
        self._costs: Costs | None = None
        self._process: SearchProcess | None = None
        self._answer: Answer | None = None

    @property
    def is_measuring(self) -> bool:
        """Whether the spans of the next step are wanted."""
        return len(self._steps) < len(self._plan)

    @property
    def is_searching(self) -> bool:
        """Whether a search is open."""
        return self._search is not None

    def choose(self, microbatches: int, step: int) -> ScheduleTable:
        """Return the table for the training step that begins, of this number (a collective call).

        There is one search for each number of micro-batches, one at a time, begun in a step that has that many.
        """
        if self.is_measuring:
            return self._build(self._plan[len(self._steps)], microbatches)
        if self._search is not None:
            self._hear(self._search, step)
        if self._search is None and microbatches not in self._searched:
            self._open(microbatches)
        if self._search is not None:
            self._tell(self._search)
        return self._use(microbatches)

    def note(self, spans: list[Span]) -> None:
        """Keep the spans of a step that was measured."""
        self._steps.append(spans)

    def _use(self, microbatches: int) -> ScheduleTable:
        if microbatches not in self._tables:
            self._tables[microbatches] = self._build(self._plan[-1], microbatches)
        return self._tables[microbatches]

    def _build(self, family: str, microbatches: int) -> ScheduleTable:
        return prepare_table(build(family, self._ranks, microbatches), splits=self._splits)

    def _open(self, microbatches: int) -> None:
        """Begin a search, on global rank 0; the first time, measured costs are gathered there."""
        self._searched.add(microbatches)
        self._search = _Search(microbatches, torch.empty(1, dtype=torch.int64, device=self._device))
        rows: list[Any] | None = [None] * self._ranks if self._group.rank() == 0 else None
        if len(self._searched) == 1:
            dist.gather_object(thin_out(self._steps[1:]), rows, group=self._group, group_dst=0)
        if dist.get_rank() != 0:
            return
        assert rows is not None  # global rank 0 is the first of its pipeline
        family = self._plan[-1]
        try:
            if self._costs is None:
                measured = Timeline(tuple(span for row in rows for span in row))
                known = build(MEASURED[0], self._ranks, microbatches)
                self._costs = estimate_costs(known, measured, w=None if self._splits else 0.0)
            # As much as DualPipeV takes: P + 1/2 micro-batches of 1/P of the model.
            cap = min(self._ranks + 0.5, microbatches)
            self._process = SearchProcess(Task(family, self._ranks, microbatches, self._costs, cap, SEARCH_SECONDS))
            say(f"searching a table for {microbatches} micro-batches, by measured costs; training goes on under {family}")
        except (ScheduleError, OSError) as error:
            self._say_failed(microbatches, error)

    def _tell(self, search: _Search) -> None:
        """Rank 0 tells all how the search stands; returns at once."""
        if dist.get_rank() == 0:
            search.state.fill_(self._look(search.microbatches))
        search.telling = dist.broadcast(search.state, src=0, async_op=True)

    def _look(self, microbatches: int) -> int:
        """On rank 0: return how the search stands; says it where nothing comes of it."""
        if self._process is None:
            return NOTHING
        if not self._process.is_done():
            return SEARCHING
        process, self._process, family = self._process, None, self._plan[-1]
        try:
            answer = process.read()
        except ScheduleError as error:
            self._say_failed(microbatches, error)
            return NOTHING
        if not answer.gain >= LEAST_GAIN:
            say(
                f"no table found for {microbatches} micro-batches that takes less time than {family} by measured costs (bubble "
                f"{answer.family_bubble:.1%}, searched {process.seconds:.0f} s): {family} stays in use"
            )
            return NOTHING
        self._answer = answer
        return FOUND

    def _hear(self, search: _Search, step: int) -> None:
        """Take what rank 0 said a step ago, and the table if there is one."""
        assert search.telling is not None
        search.telling.wait()
        state = int(search.state)
        if state == SEARCHING:
            return
        self._search = None
        if state == NOTHING:
            return
        said: list[Any] = [None]
        if self._answer is not None:
            said = [to_csv(self._answer.table)]
            self._say_found(search.microbatches, self._answer, step)
            self._answer = None
        dist.broadcast_object_list(said, src=0)
        self._tables[search.microbatches] = prepare_table(from_csv(said[0], name="auto"), splits=self._splits)

    def _say_found(self, microbatches: int, answer: Answer, step: int) -> None:
        say(
            f"from step {step} on, {microbatches} micro-batches run a table that was found: by measured costs a bubble of "
            f"{answer.bubble:.1%} ({self._plan[-1]} {answer.family_bubble:.1%}), a step {answer.gain:.1%} shorter, "
            f"at most {answer.activations:g} live activations"
        )

    def _say_failed(self, microbatches: int, error: Exception) -> None:
        say(f"the search for {microbatches} micro-batches failed ({error}): {self._plan[-1]} stays in use")


def thin_out(steps: list[list[Span]]) -> list[Span]:
    """Return of the spans of each kind, on each stage, the one of median length: all that costs are made of."""
    alike: dict[Any, list[Span]] = {}
    for span in (span for spans in steps for span in spans):
        alike.setdefault(tuple((part.kind, part.stage) for part in span.action.singles()), []).append(span)
    return [sorted(spans, key=lambda span: span.end - span.start)[(len(spans) - 1) // 2] for spans in alike.values()]


def say(what: str) -> None:
    """Print a line to the log."""
    print(f"counterflow: auto: {what}", flush=True)
