"""How close the runtime comes to what the simulator promises, and to others: ``make bench-runtime``.

Four CPU ranks, stages that sleep; this project's runtime, torch's schedules, Megatron's and DeepSpeed's turn by turn in one run
(`contestants`). Prints a table and the figures that are asked for; writes measured.json, records and pictures.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table

from counterflow.report import Picture, render_html, render_svg
from counterflow.schedule import Costs, build, load_record, simulate
from ranks import RankError, start_ranks
from tests.support import ROOT

# This project's bare runtime, under Megatron's contract, and in DeepSpeed's engine.
OURS, ADAPTER, KEY = "counterflow", "adapter", "key"
# Of the simulated makespan, the best of all steps, per milliseconds that an F sleeps.
MOST_OVER_SIMULATION = {20.0: 1.04, 5.0: 1.10}
LEAST_SAVED = (
    ("counterflow dualpipev", "torch ScheduleDualPipeV", 0.05),
    ("counterflow dualpipev", "megatron VPP 2", 0.08),
    ("counterflow zbv", "torch ScheduleZBVZeroBubble", 0.08),
)
# The same schedule through Megatron's forward-backward contract: of the bare runtime's step, and shorter than Megatron's own.
MOST_OVER_BARE = {20.0: 1.01, 5.0: 1.04}
LEAST_SAVED_BY_ADAPTER = {20.0: 0.07, 5.0: 0.08}
# In DeepSpeed's engine: over the simulated makespan.
MOST_OVER_SIMULATION_BY_KEY = {20.0: 1.03}
MOST_EXECUTOR_SECONDS = 100e-6
PIPED_WIDTH = 150


@dataclass(frozen=True)
class Result:
    """The steps of one contestant at one size; times in seconds, ``seconds`` of each F, I and W of half a rank's model."""

    name: str
    seconds: float
    simulated_makespan: float
    simulated_bubble: float
    makespans: list[float]
    bubbles: list[float]

    @property
    def best(self) -> float:
        """The shortest step."""
        return min(self.makespans)

    @property
    def median(self) -> float:
        """The middle step."""
        return statistics.median(self.makespans)

    @property
    def ratio(self) -> float:
        """The shortest step over the simulation."""
        return self.best / self.simulated_makespan


@dataclass(frozen=True)
class Figure:
    """One figure asked for, and what was measured."""

    what: str
    asked: str
    measured: str
    reached: bool


def judge(results: list[Result], executor: list[dict[str, Any]]) -> Iterator[Figure]:
    """Yield the figures asked for, each with what was measured; of steps the best counts."""
    of = {(result.name, round(1000 * result.seconds, 6)): result for result in results}
    for (name, milliseconds), result in of.items():
        most = MOST_OVER_SIMULATION.get(milliseconds)
        if most is not None and name in ("counterflow dualpipev", "counterflow zbv", "counterflow interleaved"):
            measured = f"{result.ratio:.4f} (median {result.median / result.simulated_makespan:.4f})"
            yield Figure(f"{name} over simulated, {milliseconds:g} ms", f"<= {most:.2f}", measured, result.ratio <= most)
    for milliseconds in dict.fromkeys(milliseconds for _, milliseconds in of):
        for name, other, least in LEAST_SAVED:
            mine, theirs = of[name, milliseconds], of[other, milliseconds]
            saved = 1 - mine.best / theirs.best
            measured = f"{saved:.1%} (medians {1 - mine.median / theirs.median:.1%})"
            yield Figure(f"{name} faster than {other}, {milliseconds:g} ms", f">= {least:.0%}", measured, saved >= least)
    yield from _judge_adapter(of)
    yield from _judge_key(of)
    worst = max(executor, key=lambda found: float(found["thread_median"]))
    mine_us, all_us, wall_us = (1e6 * worst[f"{clock}_median"] for clock in ("thread", "process", "wall"))
    yield Figure(
        f"executor's own time per action, empty stages ({worst['schedule']}, rank {worst['rank']}, the worst)",
        f"<= {1e6 * MOST_EXECUTOR_SECONDS:g} us",
        f"{mine_us:.0f} us (with gloo's threads {all_us:.0f}, by the clock {wall_us:.0f})",
        worst["thread_median"] <= MOST_EXECUTOR_SECONDS,
    )


def _judge_adapter(of: dict[tuple[str, float], Result]) -> Iterator[Figure]:
    for (name, milliseconds), result in of.items():
        schedule = name.removeprefix(f"{ADAPTER} ")
        if schedule == name or milliseconds not in MOST_OVER_BARE:
            continue
        bare, most = of[f"{OURS} {schedule}", milliseconds], MOST_OVER_BARE[milliseconds]
        over = result.best / bare.best
        measured = f"{over:.4f} (medians {result.median / bare.median:.4f})"
        yield Figure(f"{name} over the bare runtime, {milliseconds:g} ms", f"<= {most:.2f}", measured, over <= most)
        if schedule in ("dualpipev", "zbv"):
            theirs, least = of["megatron VPP 2", milliseconds], LEAST_SAVED_BY_ADAPTER[milliseconds]
            saved = 1 - result.best / theirs.best
            measured = f"{saved:.1%} (medians {1 - result.median / theirs.median:.1%})"
            yield Figure(f"{name} faster than megatron VPP 2, {milliseconds:g} ms", f">= {least:.0%}", measured, saved >= least)


def _judge_key(of: dict[tuple[str, float], Result]) -> Iterator[Figure]:
    for (name, milliseconds), result in of.items():
        if not name.startswith(f"{KEY} ") or milliseconds not in MOST_OVER_SIMULATION_BY_KEY:
            continue
        most = MOST_OVER_SIMULATION_BY_KEY[milliseconds]
        measured = f"{result.ratio:.4f} (median {result.median / result.simulated_makespan:.4f})"
        yield Figure(f"{name} in DeepSpeed over simulated, {milliseconds:g} ms", f"<= {most:.2f}", measured, result.ratio <= most)


def print_results(results: list[Result], figures: list[Figure], console: Console) -> None:
    """Print who took how long, fastest first, then the figures."""
    for seconds in dict.fromkeys(result.seconds for result in results):
        rows = sorted((result for result in results if result.seconds == seconds), key=lambda result: result.best)
        console.print(f"[bold]F = I = W = {1000 * seconds:g} ms; a step in ms, and its bubble[/]")
        grid = Table(box=None, pad_edge=False)
        grid.add_column("contestant", no_wrap=True)
        for heading in ("best", "median", "simulated", "best/sim.", "median/sim.", "bubble", "simulated"):
            grid.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            times = (f"{1000 * time:.1f}" for time in (row.best, row.median, row.simulated_makespan))
            ratios = (f"{time / row.simulated_makespan:.4f}" for time in (row.best, row.median))
            bubbles = (f"{share:.1%}" for share in (min(row.bubbles), row.simulated_bubble))
            grid.add_row(row.name, *times, *ratios, *bubbles, style="bold" if row.name.startswith((OURS, ADAPTER, KEY)) else "")
        console.print(grid, "")
    print_figures(figures, console)


def print_figures(figures: list[Figure], console: Console) -> None:
    """Print what was asked and what was measured."""
    grid = Table("figure", "asked", "measured", "", box=None, pad_edge=False)
    for figure in figures:
        verdict = "[green]PASS[/]" if figure.reached else "[red]NOT REACHED[/]"
        grid.add_row(figure.what, figure.asked, figure.measured, verdict)
    console.print(grid)


def draw_steps(out: Path, results: list[Result], ranks: int, microbatches: int) -> None:
    """Write the best recorded DualPipeV step over its simulation, per size, as a page and a picture."""
    for result in results:
        if result.name != "counterflow dualpipev":
            continue
        step, size = 1 + result.makespans.index(result.best), f"{1000 * result.seconds:g}ms"
        table = build("dualpipev", ranks, microbatches)
        costs = Costs(result.seconds, result.seconds, result.seconds)
        measured = load_record(out / f"record-{size}" / "dualpipev", step)
        pictures = [
            Picture("simulated, pairs as one block", table, simulate(table, costs)),
            Picture(f"measured (step {step})", table, measured),
        ]
        (out / f"dualpipev-{size}.html").write_text(render_html(pictures), encoding="utf-8")
        (out / f"dualpipev-{size}.svg").write_text(render_svg(pictures), encoding="utf-8")


def draw_bars(results: list[Result]) -> str:
    """Return an SVG: per size a bar per contestant for its best step, light up to what its own table promises."""
    row, left, width = 22, 240, 420
    lines, y = [], 10
    for seconds in dict.fromkeys(result.seconds for result in results):
        rows = sorted((result for result in results if result.seconds == seconds), key=lambda result: result.best)
        scale = width / rows[-1].best
        y += row
        lines.append(f'<text x="10" y="{y}" font-weight="bold">F = I = W = {1000 * seconds:g} ms: best step</text>')
        for result in rows:
            y += row
            colour, light = ("#1f5fbf", "#a9c6f2") if result.name.startswith((OURS, ADAPTER, KEY)) else ("#777777", "#cccccc")
            note = f"{1000 * result.best:.0f} ms, {result.ratio:.3f} of simulated"
            lines += [
                f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(result.name)}</text>',
                f'<rect x="{left}" y="{y - 13}" width="{result.best * scale:.1f}" height="16" fill="{colour}"/>',
                f'<rect x="{left}" y="{y - 13}" width="{result.simulated_makespan * scale:.1f}" height="16" fill="{light}"/>',
                f'<text x="{left + result.best * scale + 8:.1f}" y="{y}">{note}</text>',
            ]
        y += row
    lines.append(f'<text x="10" y="{y}">light: what the contestant\'s own table promises; dark: what its runtime adds</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="880" height="{y + 14}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>"]) + "\n"


def measure(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Start the ranks and return what rank 0 wrote."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.runtime_rank", "--out", str(given.out)]
    command += ["--microbatches", str(given.microbatches), "--rounds", str(given.steps)]
    command += ["--milliseconds", *(f"{milliseconds:g}" for milliseconds in given.milliseconds)]
    for stale in given.out.glob("record-*/*/timeline-rank*.jsonl"):
        stale.unlink()
    with console.status("starting") as status:
        start_ranks(given.ranks, command, given.out / "logs", lambda line: status.update(line.strip()))
    measured: dict[str, Any] = json.loads((given.out / "measured.json").read_text())
    return measured


def main() -> None:
    """Measure, print, draw; status 1 where a figure is not reached."""
    parser = argparse.ArgumentParser(
        description="Compare this project's runtime with its simulator, torch's, Megatron's and DeepSpeed's."
    )
    parser.add_argument("--milliseconds", type=float, nargs="+", default=[20.0, 5.0], metavar="T", help="of an F (default: 20 5)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps of each contestant (default: 10)")
    parser.add_argument("--ranks", type=int, default=4, metavar="P", help="pipeline ranks (default: 4)")
    parser.add_argument("--microbatches", type=int, default=16, metavar="M", help="micro-batches per step (default: 16)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-runtime", metavar="DIR", help="where results go")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        measured = measure(given, Console(stderr=True))
    except RankError as error:
        sys.exit(f"bench-runtime: {error}")
    results = [Result(**result) for result in measured["results"]]
    figures = list(judge(results, measured["executor"]))
    draw_steps(given.out, results, given.ranks, given.microbatches)
    (given.out / "steps.svg").write_text(draw_bars(results), encoding="utf-8")
    if given.json:
        print(json.dumps({**measured, "figures": [asdict(figure) for figure in figures]}, indent=2))
    else:
        print_results(results, figures, Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
        print(f"pictures, records and all steps: {given.out}")
    sys.exit(0 if all(figure.reached for figure in figures) else 1)


if __name__ == "__main__":
    main()
