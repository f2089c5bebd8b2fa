"""``--cf-schedule auto``: measure the costs of actions in the first steps, search a table for these costs, and use it.

The model is laid out as a V, two chunks a rank. The first step warms up; the next ones are measured, under a family with split
backward passes. With ``--cf-costs`` costs are known and no step is measured. Then global rank 0 collects the costs of its
pipeline and starts a search in another process (`counterflow.schedule.search_process`). Training goes on under a family
meanwhile.

All ranks must change tables at the same step, but only rank 0 knows when the search has ended. So during a search, rank 0
broadcasts its state, one number, in each step. The broadcast starts at the begin of a step and is waited for at the begin of the
next one. It runs beside a whole step, so no rank waits for it, and all ranks read the same number at the same step. (On a GPU,
the host then waits for the work that it has issued. Trainers do that in each step anyway, to read the loss.) In the step in
which all ranks read that a table was found, rank 0 broadcasts the table, and all use it from this step on. Steps of an
evaluation do not count.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.schedule import Costs, ScheduleTable, Span, Timeline, build, from_csv, to_csv
from counterflow.schedule.comparison import estimate_costs
from counterflow.schedule.search_process import Answer, SearchProcess, Task
from counterflow.trainer.tables import AUTO_FAMILY, AUTO_FAMILY_WITH_PAIRS, prepare_table

# The families that the first steps run; the very first step warms up.
MEASURED = (AUTO_FAMILY.name,) * 3
MEASURED_PAIRS = (AUTO_FAMILY_WITH_PAIRS.name,) * 2
SEARCH_SECONDS = 10.0
# How much shorter than the family's a step must be for another table to be worth it.
LEAST_GAIN = 0.001
SEARCHING, FOUND, NOTHING = range(3)


@dataclass
class _Search:
    """A running search for a number of micro-batches, and the broadcast of its state."""

    microbatches: int
    state: torch.Tensor
    broadcast: dist.Work | None = None


class AutoTable:
    """Chooses the table that ``auto`` runs; every rank of every pipeline makes the same calls.

    ``has_pairs``: pairs overlap (``--cf-overlap``), so they are measured too. ``splits``: an I leaves weight gradients to its W.
    ``costs``: what to search by in place of a measurement, for a model chunk or per stage.
    """

    def __init__(self, pp_group: Any, device: torch.device, *, has_pairs: bool, splits: bool, costs: Costs | None = None) -> None:
        self._group, self._ranks, self._device, self._splits = pp_group, pp_group.size(), device, splits
        self._given = costs
        self._plan = MEASURED + (MEASURED_PAIRS if has_pairs else ())
        self._steps: list[list[Span]] = []
        self._tables: dict[int, ScheduleTable] = {}
        self._searched: set[int] = set()
        self._search: _Search | None = None
        # Only rank 0 has these.
        self._costs: Costs | None = None
        self._process: SearchProcess | None = None
        self._found: Answer | None = None

    @property
    def is_measuring(self) -> bool:
        """Whether the next step is to be measured."""
        return self._given is None and len(self._steps) < len(self._plan)

    @property
    def is_searching(self) -> bool:
        """Whether a search is running."""
        return self._search is not None

    def choose(self, microbatches: int, step: int) -> ScheduleTable:
        """Return the table for training step ``step``, which begins now (a collective call).

        Each number of micro-batches has a search of its own, started in a step of that size. One search runs at a time.
        """
        if self.is_measuring:
            return self._build(self._plan[len(self._steps)], microbatches)
        if self._search is not None:
            self._receive_state(self._search, step)
        if self._search is None and microbatches not in self._searched:
            self._open(microbatches)
        if self._search is not None:
            self._send_state(self._search)
        return self._use(microbatches)

    def note(self, spans: list[Span]) -> None:
        """Keep the spans of a measured step."""
        self._steps.append(spans)

    def _use(self, microbatches: int) -> ScheduleTable:
        if microbatches not in self._tables:
            self._tables[microbatches] = self._build(self._plan[-1], microbatches)
        return self._tables[microbatches]

    def _build(self, family: str, microbatches: int) -> ScheduleTable:
        return prepare_table(build(family, self._ranks, microbatches), splits=self._splits)

    def _open(self, microbatches: int) -> None:
        """Start a search on global rank 0; the first time, measured costs are gathered there."""
        self._searched.add(microbatches)
        self._search = _Search(microbatches, torch.empty(1, dtype=torch.int64, device=self._device))
        rows: list[Any] | None = [None] * self._ranks if self._group.rank() == 0 else None
        if self._given is None and len(self._searched) == 1:
            dist.gather_object(thin_out(self._steps[1:]), rows, group=self._group, group_dst=0)
        if dist.get_rank() != 0:
            return
        assert rows is not None  # global rank 0 is the first of its pipeline
        family = self._plan[-1]
        try:
            if self._costs is None:
                self._costs = self._find_costs(rows, microbatches)
            # DualPipeV's peak of activations: P + 1/2 micro-batches of 1/P of the model.
            cap = min(self._ranks + 0.5, microbatches)
            self._process = SearchProcess(Task(family, self._ranks, microbatches, self._costs, cap, SEARCH_SECONDS))
            say(f"searching a table for {microbatches} micro-batches, by {self._source} costs; training goes on under {family}")
        except (ScheduleError, OSError) as error:
            self._say_failed(microbatches, error)

    @property
    def _source(self) -> str:
        return "measured" if self._given is None else "the given"

    def _find_costs(self, rows: list[Any], microbatches: int) -> Costs:
        """Return the costs of a model chunk as this run computes it: no overlap and no split backwards where it has none."""
        if self._given is not None:
            costs = self._given.spread(2 * self._ranks)
            costs = costs if len(self._plan) > len(MEASURED) else replace(costs, overlap=1.0)
            return costs if self._splits else replace(costs, i=_add(costs.i, costs.w), w=0.0)
        measured = Timeline(tuple(span for row in rows for span in row))
        known = build(MEASURED[0], self._ranks, microbatches)
        return estimate_costs(known, measured, w=None if self._splits else 0.0)

    def _send_state(self, search: _Search) -> None:
        """Start the broadcast of the search's state from rank 0; return at once."""
        if dist.get_rank() == 0:
            search.state.fill_(self._check_search(search.microbatches))
        search.broadcast = dist.broadcast(search.state, src=0, async_op=True)

    def _check_search(self, microbatches: int) -> int:
        """Return the search's state, on rank 0; print a line if it ended without a table."""
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
                f"no table found for {microbatches} micro-batches that takes less time than {family} by {self._source} costs "
                f"(bubble {answer.family_bubble:.1%}, searched {process.seconds:.0f} s): {family} stays in use"
            )
            return NOTHING
        self._found = answer
        return FOUND

    def _receive_state(self, search: _Search, step: int) -> None:
        """Read the state that rank 0 sent in the last step, and receive the table if one was found."""
        assert search.broadcast is not None
        search.broadcast.wait()
        state = int(search.state)
        if state == SEARCHING:
            return
        self._search = None
        if state == NOTHING:
            return
        csv: list[Any] = [None]
        if self._found is not None:
            csv = [to_csv(self._found.table)]
            self._say_found(search.microbatches, self._found, step)
            self._found = None
        dist.broadcast_object_list(csv, src=0)
        self._tables[search.microbatches] = prepare_table(from_csv(csv[0], name="auto"), splits=self._splits)

    def _say_found(self, microbatches: int, answer: Answer, step: int) -> None:
        say(
            f"from step {step} on, {microbatches} micro-batches run a table that was found: by {self._source} costs a bubble of "
            f"{answer.bubble:.1%} ({self._plan[-1]} {answer.family_bubble:.1%}), a step {answer.gain:.1%} shorter, "
            f"at most {answer.activations:g} live activations"
        )

    def _say_failed(self, microbatches: int, error: Exception) -> None:
        say(f"the search for {microbatches} micro-batches failed ({error}): {self._plan[-1]} stays in use")


def _add(one: Any, other: Any) -> tuple[float, ...]:
    return tuple(sum(both) for both in zip(one, other, strict=True))


def thin_out(steps: list[list[Span]]) -> list[Span]:
    """Return, for each kind of action on each stage, the span of median length; costs are computed from these."""
    alike: dict[Any, list[Span]] = {}
    for span in (span for spans in steps for span in spans):
        alike.setdefault(tuple((part.kind, part.stage) for part in span.action.singles()), []).append(span)
    return [sorted(spans, key=lambda span: span.end - span.start)[(len(spans) - 1) // 2] for spans in alike.values()]


def say(what: str) -> None:
    """Print a line to the log."""
    print(f"counterflow: auto: {what}", flush=True)
