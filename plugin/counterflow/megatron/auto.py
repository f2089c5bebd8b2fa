"""``--cf-schedule auto``: measure what actions cost in the first steps, search a table for them, and use it.

The model is laid out as a V, two chunks a rank. A first step warms up, the next ones are measured, under a family whose
backward passes are split. Then one rank takes the medians of its pipeline, searches, and all take its table: a search works
against the clock, so no two ranks would find the same.
"""

from typing import Any

import torch.distributed as dist

from counterflow.schedule import Costs, ScheduleTable, Span, Timeline, build, from_csv, lay_v, simulate, to_csv
from counterflow.schedule.comparison import estimate_costs

# What the first steps run: ZB-V has F, I and W apart; the first of them warms up. DualPipeV has pairs, whose overlap counts.
MEASURED = ("zbv", "zbv", "zbv")
MEASURED_PAIRS = ("dualpipev", "dualpipev")
SEARCH_SECONDS = 10.0


class AutoTable:
    """Which table ``auto`` runs now; every rank of every pipeline makes the same calls.

    ``has_pairs``: pairs overlap (``--cf-overlap``), so theirs is measured too. ``splits``: an I leaves work to its W.
    """

    def __init__(self, pp_group: Any, *, has_pairs: bool, splits: bool) -> None:
        self._group, self._ranks, self._splits = pp_group, pp_group.size(), splits
        self._plan = MEASURED + (MEASURED_PAIRS if has_pairs else ())
        self._steps: list[list[Span]] = []
        self._costs: Costs | None = None
        self._found: dict[int, ScheduleTable] = {}

    @property
    def is_measuring(self) -> bool:
        """Whether the spans of the next step are wanted."""
        return len(self._steps) < len(self._plan)

    def choose(self, microbatches: int) -> ScheduleTable:
        """Return the table for the next step; once costs are measured, this searches (a collective call)."""
        if self.is_measuring:
            return build(self._plan[len(self._steps)], self._ranks, microbatches)
        if microbatches not in self._found:
            self._found[microbatches] = self._search(microbatches)
        return self._found[microbatches]

    def note(self, spans: list[Span]) -> None:
        """Keep the spans of a step that was measured."""
        self._steps.append(spans)

    def _search(self, microbatches: int) -> ScheduleTable:
        """Search on global rank 0; return the table that it found, on every rank."""
        spans = [span for step in self._steps[1:] for span in step]
        rows: list[Any] | None = [None] * self._ranks if self._group.rank() == 0 else None
        dist.gather_object(spans, rows, group=self._group, group_dst=0)
        said: list[Any] = [None]
        if dist.get_rank() == 0:
            assert rows is not None  # global rank 0 is the first of its pipeline
            known = build("zbv", self._ranks, microbatches)
            measured = Timeline(tuple(span for row in rows for span in row))
            costs = self._costs or estimate_costs(known, measured, w=None if self._splits else 0.0)
            self._costs = costs
            said = [to_csv(search_for(known, costs))]
        dist.broadcast_object_list(said, src=0)
        return from_csv(said[0], name="auto")


def search_for(known: ScheduleTable, costs: Costs) -> ScheduleTable:
    """Return a table on the layout of ``known`` (ZB-V), found within DualPipeV's memory; says what it promises."""
    from counterflow.schedule.search import search  # loads a compiler

    ranks, microbatches = known.ranks, known.microbatches
    # As much as DualPipeV takes: P + 1/2 micro-batches of 1/P of the model.
    cap = min(ranks + 0.5, microbatches)
    found = search(ranks, microbatches, costs, max_activations=cap, seconds=SEARCH_SECONDS, layout=lay_v(ranks))
    print(
        f"counterflow: auto: the table found has a bubble of {found.timeline.bubble:.1%} for the measured costs "
        f"(ZB-V {simulate(known, costs).bubble:.1%}) and at most {max(found.timeline.peak_activations):g} live activations",
        flush=True,
    )
    return found.table
