"""The search against every family that fits the cap, case by case: `python -m benchmarks.search_grid`.

Each case has its ranks, micro-batches, stage costs, P2P time, overlap and memory cap; a rank's F = I = W = 1 where stages
are equal. A case counts as lost where the search is slower than the best family, Megatron's interleaved
tables at every VPP included.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from counterflow.schedule import Costs
from counterflow.schedule.search import search

UNEVEN = ("heavy last", "light first")


@dataclass(frozen=True)
class Case:
    """What is given to the search; ``cap`` in units of 1F1B's live activations."""

    ranks: int
    microbatches: int
    max_chunks: int
    stages: str
    p2p: float
    overlap: float
    cap: float

    def make_costs(self) -> Costs:
        """Return the costs of the finest cut: a heavy last rank does half as much again, a light first one two thirds."""
        each = [1 / self.max_chunks] * (self.ranks * self.max_chunks)
        if self.stages == "heavy last":
            each[-1] += 0.5
        if self.stages == "light first":
            each[0] *= 1 / 3
        return Costs(each, each, each, p2p=self.p2p, overlap=self.overlap)


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: Case
    makespan: float
    family: str | None
    family_makespan: float | None
    gap: float
    seconds: float
    table: str


def list_cases() -> list[Case]:
    """Return 72 cases: every size with every kind of stages, P2P, overlap and cap taken in turn."""
    sizes = [(4, 8), (4, 16), (4, 32), (4, 64), (8, 8), (8, 16), (8, 32), (8, 64), (12, 24), (12, 48), (16, 32), (16, 64)]
    cases = []
    for number, (ranks, microbatches) in enumerate(sizes):
        for turn, (stages, cap) in enumerate((s, c) for s in ("equal", *UNEVEN) for c in (1.0, 1.5)):
            p2p = (0.0, 0.1, 0.3)[(number + turn) % 3]
            overlap = (0.7, 0.8, 0.9, 1.0)[(number + turn // 2) % 4]
            chunks = 8 if ranks <= 8 and turn % 3 == 2 else 4
            cases.append(Case(ranks, microbatches, chunks, stages, p2p, overlap, cap))
    return cases


def run_case(task: tuple[Case, float, int]) -> Outcome:
    """Search one case."""
    case, seconds, seed = task
    begun = time.monotonic()
    found = search(
        case.ranks, case.microbatches, case.make_costs(), max_chunks=case.max_chunks,
        max_activations=case.cap * case.ranks, seconds=seconds, seed=seed,
    )  # fmt: skip
    took = time.monotonic() - begun
    name = f"{found.table.name} {found.table.layout.name}"
    return Outcome(case, found.timeline.makespan, found.family, found.family_makespan, found.gap, took, name)


def write_line(outcome: Outcome) -> str:
    """Return a case and its outcome on one line."""
    c = outcome.case
    given = (
        f"P {c.ranks:>2}  M {c.microbatches:>2}  chunks {c.max_chunks}  {c.stages:<11}  p2p {c.p2p:<3}  overlap {c.overlap:<3}"
    )
    found = f"cap {c.cap * c.ranks:>4g}  found {outcome.makespan:8.3f}  {outcome.table:<18}"
    family = f"{outcome.family or '-':<11} {outcome.family_makespan or 0:8.3f}"
    return f"{given}  {found}  {family}  gap {100 * outcome.gap:5.2f} %  {outcome.seconds:4.1f} s"


def summarise(outcomes: list[Outcome]) -> dict[str, float]:
    """Return the figures over all cases."""
    better = [o.family_makespan is None or o.makespan < o.family_makespan * (1 - 1e-6) for o in outcomes]
    uneven = [one for one, o in zip(better, outcomes, strict=True) if o.case.stages in UNEVEN]
    return {
        "cases": len(outcomes),
        "lost": sum(o.family_makespan is not None and o.makespan > o.family_makespan * (1 + 1e-9) for o in outcomes),
        "better": sum(better),
        "uneven cases": len(uneven),
        "better in uneven cases": sum(uneven),
        "median gap to lower bound, %": 100 * statistics.median(o.gap for o in outcomes),
        "median time against best family, %": 100
        * statistics.median(o.makespan / o.family_makespan - 1 for o in outcomes if o.family_makespan),
        "longest search, s": max(o.seconds for o in outcomes),
    }


def main() -> None:
    """Run the grid, a line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=17.0, help="time of each search (default: 17)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="searches side by side, a core each (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes there")
    options = parser.parse_args()
    search(4, 8, Costs(overlap=0.8), max_chunks=2, seconds=0.1)  # compiles once, before the workers start
    tasks = [(case, options.seconds, options.seed) for case in list_cases()]
    outcomes = []
    with multiprocessing.Pool(options.workers) as pool:
        for outcome in pool.imap(run_case, tasks):
            outcomes.append(outcome)
            print(write_line(outcome), flush=True)
    figures = summarise(outcomes)
    for name, value in figures.items():
        print(f"{name}: {value:g}")
    if options.json:
        rows = [asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps({"figures": figures, "outcomes": rows}, indent=1))


if __name__ == "__main__":
    main()
