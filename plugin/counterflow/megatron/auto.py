"""``--cf-schedule auto``: measure what actions cost in the first steps, search a table for them, and use it.

The model is laid out as a V, two chunks a rank. A first step warms up, the next ones are measured, under a family whose
backward passes are split. Then the costs are averaged over all ranks, one rank searches and all take its table: a
search works against the clock, so no two ranks would find the same.
"""

from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from counterflow.schedule import Costs, ScheduleTable, Span, build, from_csv, lay_v, simulate, to_csv
from counterflow.schedule.actions import PAIR

# What the first steps run: ZB-V has F, I and W apart; the first of them warms up. DualPipeV has pairs, whose overlap counts.
MEASURED = ("zbv", "zbv", "zbv")
MEASURED_PAIRS = ("dualpipev", "dualpipev")
SEARCH_SECONDS = 10.0


class AutoTable:
    """Which table ``auto`` runs now; every rank of every pipeline makes the same calls."""

    def __init__(self, ranks: int, device: torch.device, has_pairs: bool) -> None:
        self._ranks, self._device = ranks, device
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
        if self._costs is None:
            self._costs = average_costs(self._steps, 2 * self._ranks, self._device)
        if microbatches not in self._found:
            self._found[microbatches] = search_together(self._ranks, microbatches, self._costs)
        return self._found[microbatches]

    def note(self, spans: list[Span]) -> None:
        """Keep the spans of a step that was measured."""
        self._steps.append(spans)


def average_costs(steps: list[list[Span]], stages: int, device: torch.device) -> Costs:
    """Return the seconds of F, I and W per stage, and the overlap of pairs: medians, averaged over the ranks that have them."""
    singles = [span for spans in steps[1 : len(MEASURED)] for span in spans]
    times = [[_median(s.end - s.start for s in singles if _is(s, k, stage)) for stage in range(stages)] for k in "FIW"]
    pairs = [span for spans in steps[len(MEASURED) + 1 :] for span in spans if span.action.kind == PAIR]
    sums = torch.tensor([*times[0], *times[1], *times[2]], dtype=torch.float64, device=device)
    counts = (sums > 0).double()
    dist.all_reduce(sums)
    dist.all_reduce(counts)
    f, i, w = (sums / counts.clamp(min=1)).reshape(3, stages).tolist()
    alone = [f[span.action.stage] + i[back] + w[back] for span in pairs if (back := span.action.parts[1].stage) >= 0]
    share = _median(min(1.0, (span.end - span.start) / time) for span, time in zip(pairs, alone, strict=True))
    overlap = torch.tensor([share, float(share > 0)], dtype=torch.float64, device=device)
    dist.all_reduce(overlap)
    return Costs(f=f, i=i, w=w, overlap=float(overlap[0] / overlap[1]) if overlap[1] else 1.0)


def _is(span: Span, kind: str, stage: int) -> bool:
    return span.action.kind == kind and span.action.stage == stage


def _median(times: Iterable[float]) -> float:
    found = list(times)
    return median(found) if found else 0.0


def search_together(ranks: int, microbatches: int, costs: Costs) -> ScheduleTable:
    """Search on global rank 0, within DualPipeV's memory; return the table that it found, on every rank."""
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        from counterflow.schedule.search import search  # loads a compiler

        known = build("zbv", ranks, microbatches)
        # As much memory as DualPipeV takes: P + 1/2 micro-batches of 1/P of the model.
        cap = min(ranks + 0.5, microbatches)
        found = search(ranks, microbatches, costs, max_activations=cap, seconds=SEARCH_SECONDS, layout=lay_v(ranks))
        said = [to_csv(found.table)]
        print(
            f"counterflow: auto: the table found has a bubble of {found.timeline.bubble:.1%} for the measured costs "
            f"(ZB-V {simulate(known, costs).bubble:.1%}) and at most {max(found.timeline.peak_activations):g} live activations",
            flush=True,
        )
    dist.broadcast_object_list(said, src=0)
    return from_csv(said[0], name="auto")
