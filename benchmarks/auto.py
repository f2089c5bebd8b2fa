"""``--cf-schedule auto`` beside a training: does its search hold a step, do all ranks change tables at once, do numbers stay?

Four CPU ranks train on stages that sleep, through the adapter, as Megatron calls it. The command prints every phase with its
steps, then the figures asked for; it ends with status 1 when one of them is not reached. Results are in runs/bench-auto.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.runtime import PIPED_WIDTH, Figure, print_figures
from ranks import RankError, start_ranks
from tests.support import ROOT

MOST_OVER_MEDIAN = 1.5
# Steps in which ranks connect to each other.
WARM_UP = 1

Step = list[dict[str, Any]]  # one a rank


def find_time(step: Step) -> float:
    """Return how long a step took, from the first rank's begin to the last one's end."""
    return float(max(rank["end"] for rank in step) - min(rank["begin"] for rank in step))


def name_phases(steps: list[Step]) -> list[str]:
    """Return each step's phase; the first step after the search, in which tables change, is one of its own."""
    phases = [step[0]["phase"] for step in steps]
    if "searches" in phases and "is done" in phases:
        phases[phases.index("is done")] = "changes"
    return phases


def judge(steps: list[Step]) -> Iterator[Figure]:
    """Yield the figures asked for, each with what was measured."""
    times, phases = [find_time(step) for step in steps], name_phases(steps)
    median = statistics.median(times[WARM_UP:])
    longest, number = max(
        (time, number) for number, (time, phase) in enumerate(zip(times, phases, strict=True), start=1) if number > WARM_UP
    )
    yield Figure(
        "the longest step over the median",
        f"<= {MOST_OVER_MEDIAN}",
        f"{longest / median:.3f} (step {number}, which {phases[number - 1]}: {1000 * longest:.0f} ms)",
        longest <= MOST_OVER_MEDIAN * median,
    )
    changes = [_list_changes([step[rank]["digest"] for step in steps]) for rank in range(len(steps[0]))]
    searched = phases.index("searches") + 1
    yield Figure(
        "all ranks change to the table found at the same step, once, after the search began",
        "the same",
        "; ".join(sorted({f"step {', '.join(map(str, found)) or 'none'}" for found in map(tuple, changes)})),
        len({tuple(found) for found in changes}) == 1 and len(changes[0]) == 1 and changes[0][0] > searched,
    )
    numbers = {json.dumps([[rank["losses"], rank["gradients"]] for rank in step]) for step in steps}
    yield Figure("losses and gradients under both tables", "the same", f"{len(numbers)} kinds of steps", len(numbers) == 1)


def _list_changes(digests: list[int]) -> list[int]:
    return [number for number in range(2, len(digests) + 1) if digests[number - 1] != digests[number - 2]]


def print_steps(steps: list[Step], console: Console) -> None:
    """Print the steps of each phase."""
    grid = Table("phase", "steps", "table", "median ms", "longest ms", box=None, pad_edge=False)
    phases, times = name_phases(steps), [find_time(step) for step in steps]
    for phase in dict.fromkeys(phases):
        chosen = [number for number, one in enumerate(phases) if one == phase]
        found = [1000 * times[number] for number in chosen]
        names = ", ".join(dict.fromkeys(steps[number][0]["table"] for number in chosen))
        grid.add_row(phase, str(len(chosen)), names, f"{statistics.median(found):.1f}", f"{max(found):.1f}")
    console.print(grid, "")


def main() -> None:
    """Measure, print; status 1 where a figure is not reached."""
    parser = argparse.ArgumentParser(description="Train under --cf-schedule auto on stages that sleep; look at every step.")
    parser.add_argument("--milliseconds", type=float, default=10.0, metavar="T", help="of an F (default: 10)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of the search (default: 10, as in training)")
    parser.add_argument("--after", type=int, default=10, metavar="N", help="steps after the search (default: 10)")
    parser.add_argument("--ranks", type=int, default=4, metavar="P", help="pipeline ranks (default: 4)")
    parser.add_argument("--microbatches", type=int, default=8, metavar="M", help="micro-batches per step (default: 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-auto", metavar="DIR", help="where results go")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.auto_rank"]
    for name in ("microbatches", "milliseconds", "seconds", "after", "out"):
        command += [f"--{name}", str(getattr(given, name))]
    try:
        with Console(stderr=True).status("starting") as status:
            logs = start_ranks(given.ranks, command, given.out / "logs", lambda line: status.update(line.strip()))
    except RankError as error:
        sys.exit(f"bench-auto: {error}")
    steps: list[Step] = json.loads((given.out / "measured.json").read_text())["steps"]
    figures = list(judge(steps))
    said = [line for line in (logs / "0" / "stdout.log").read_text().splitlines() if line.startswith("counterflow: ")]
    if given.json:
        print(json.dumps({"steps": steps, "said": said, "figures": [asdict(figure) for figure in figures]}, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        print_steps(steps, console)
        print(*said, "", sep="\n")
        print_figures(figures, console)
    sys.exit(0 if all(figure.reached for figure in figures) else 1)


if __name__ == "__main__":
    main()
