"""How far the planner's estimates are from published runs, and from runs on CPU ranks whose stages sleep.

``score`` (the default) estimates every published run of a table and prints predicted and measured side by side, misses included,
then the figures asked for; with ``--held-out`` each family of models is predicted with constants fitted to the others. ``fit``
fits the constants to the runs and writes them into ``constants.toml``. ``search`` times searches and an estimate. ``cpu``
calibrates on one layout of CPU ranks and predicts five others.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.runtime import PIPED_WIDTH, Figure, print_figures
from counterflow.errors import CounterflowError
from counterflow.planner import constants as store
from counterflow.planner.calibration import Run, Runs, fit_constants
from counterflow.planner.config import parse_config
from counterflow.planner.constants import Constants, read_constants
from counterflow.planner.estimate import describe, estimate_config
from tests.support import ROOT
from tests.support.running import load_module

SHARED = ROOT.parent / "shared"
MOST_STEP_ERROR, MOST_ANCHORED, LEAST_PAIRS, LEAST_TAU, MOST_REGRET, MOST_PEAK = 0.25, 0.10, 0.85, 0.8, 0.05, 0.15


def list_runs(rows: Sequence[dict[str, str]], rules: ModuleType) -> list[Run]:
    """Return the rows that state a plan and a step time; those that a note excludes are left out."""
    found = []
    for row in rows:
        seconds = rules.published_step(row)
        if rules.usable(row) and seconds and "EXCLUDE" not in row["note"]:
            found.append(Run(row["id"], row["group"], parse_config(rules.to_config(row)), float(seconds)))
    return found


def name_family(run: Run) -> str:
    """Return the family of a run's model, which is held out as a whole: its maker's name and series."""
    name = str(run.config.model.name)
    return "DeepSeek" if name.startswith("DSV3") else re.split(r"[-.\d]", name)[0]


def predict_held_out(runs: Sequence[Run], status: Any) -> dict[str, float]:
    """Return seconds by run, each predicted by constants that were fitted to other families of models."""
    found: dict[str, float] = {}
    for family in sorted({name_family(run) for run in runs}):
        status.update(f"fitting without {family}")
        own = [run for run in runs if name_family(run) == family]
        fit = fit_constants([run for run in runs if name_family(run) != family], Constants(priors=True), own=False)
        found |= dict(zip((run.name for run in own), Runs(own).predict(fit.constants).tolist(), strict=True))
    return found


def measure_error(runs: Sequence[Run], predicted: dict[str, float]) -> float:
    """Return the median of how far predicted steps are off."""
    return statistics.median(abs(predicted[run.name] / run.seconds - 1.0) for run in runs)


def estimate_row(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the estimate of a row's plan, None where it is refused."""
    try:
        return describe(estimate_config(parse_config(config)))
    except CounterflowError:
        return None


def judge(scores: dict[str, Any], held: float | None) -> Iterator[Figure]:
    """Yield the figures asked for."""
    yield _limit("median error of the step, uncalibrated", scores["step_median_error"], MOST_STEP_ERROR)
    if held is not None:
        yield _limit("the same, the model's family held out of the fit", held, MOST_STEP_ERROR)
    yield _limit("median error after one anchor per group", scores["anchored_median_error"], MOST_ANCHORED)
    right = scores["pairs_right"]
    yield Figure(
        f"pairs in one group in the right order, of {scores['pairs']}",
        f">= {100 * LEAST_PAIRS:.0f} %", f"{100 * right:.0f} %", right >= LEAST_PAIRS,
    )  # fmt: skip
    for group, tau in scores["tau"]:
        yield Figure(f"Kendall's tau of {group}", f">= {LEAST_TAU}", f"{tau:.2f}", tau >= LEAST_TAU)
    for group, regret in scores["regret"]:
        yield _limit(f"ranked first over the best of {group}", regret, MOST_REGRET)
    yield _limit("median error of the peak, forced routing", scores["peak_median_error"], MOST_PEAK)
    for name in ("called_out_of_memory_but_ran", "said_fits_but_ran_out"):
        yield Figure(name.replace("_", " "), "none", ", ".join(scores[name]) or "none", not scores[name])


def _limit(words: str, value: float, most: float) -> Figure:
    return Figure(words, f"<= {100 * most:.0f} %", f"{100 * value:.1f} %", value <= most)


def print_runs(runs: Sequence[Run], predicted: dict[str, float], held: dict[str, float], console: Console) -> None:
    """Print every run, predicted over measured; held: by constants that know nothing of its family."""
    grid = Table("run", "model", "GPU", "measured s", "predicted s", "off", "held out", box=None, pad_edge=False)
    for run in sorted(runs, key=lambda one: (str(one.config.model.name), one.group, one.name)):
        off = 100 * (predicted[run.name] / run.seconds - 1)
        out = f"{100 * (held[run.name] / run.seconds - 1):+.0f} %" if run.name in held else ""
        grid.add_row(
            run.name, str(run.config.model.name), run.config.cluster.gpu, f"{run.seconds:.3g}", f"{predicted[run.name]:.3g}",
            f"{off:+.0f} %", out,
        )  # fmt: skip
    console.print(grid, "")


def run_score(given: argparse.Namespace) -> int:
    """Print all runs and the figures; return 1 where one is missed."""
    rules = load_module(given.rules)
    rows = rules.read(given.data)
    runs = list_runs(rows, rules)
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    with Console(stderr=True).status("estimating") as status:
        held = predict_held_out(runs, status) if given.held_out else {}
        scores = rules.score(rows, estimate_row)
    predicted = dict(zip((run.name for run in runs), Runs(runs).predict(Constants()).tolist(), strict=True))
    figures = list(judge(scores, measure_error(runs, held) if held else None))
    if given.json:
        print(json.dumps({"predicted_s": predicted, "held_out_s": held, "scores": scores}, indent=2, default=str))
    else:
        print_runs(runs, predicted, held, console)
        print(f"{scores['rows']} runs, {scores['unanswered']} without an answer")
        print_figures(figures, console)
    return 0 if all(figure.reached for figure in figures) else 1


def run_fit(given: argparse.Namespace) -> int:
    """Fit the constants to the runs and write those that moved into ``constants.toml``."""
    rules = load_module(given.rules)
    runs = list_runs(rules.read(given.data), rules)
    with Console(stderr=True).status("fitting"):
        fit = fit_constants(runs, Constants(priors=True), own=False)
    text = store.PATH.read_text(encoding="utf-8")
    for name, constant in read_constants().items():
        value = fit.constants[name]
        text = _write_value(text, name, None if abs(value / constant.prior - 1) < 5e-3 else value)
        print(f"{name:<24} {constant.prior:8.3g} → {value:8.3g}{'   identified' if name in fit.identified else ''}")
    store.PATH.write_text(text, encoding="utf-8")
    print(f"median error {100 * statistics.median(map(abs, fit.residuals.values())):.1f} %, sigma {fit.sigma:.3f}")
    return 0


def _write_value(text: str, name: str, value: float | None) -> str:
    head, mark, rest = text.partition(f"[{name}]\n")
    entry, gap, after = rest.partition("\n[")
    entry = re.sub(r"^value = .*\n", "", entry, flags=re.MULTILINE)
    if value is not None:
        entry = re.sub(r"^(spread = .*\n)", rf"\1value = {value:.4g}\n", entry, flags=re.MULTILINE)
    return head + mark + entry + gap + after


def main() -> None:
    """Measure, print; status 1 where a figure is not reached."""
    parser = argparse.ArgumentParser(description="Score the planner on published runs, and on CPU ranks that sleep.")
    parser.add_argument("part", nargs="?", choices=("score", "fit", "cpu", "search"), default="score")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "plan_truth.csv", help="the table of published runs")
    parser.add_argument("--rules", type=Path, default=SHARED / "tools" / "plan_rows.py", help="reads rows, scores estimates")
    parser.add_argument("--held-out", action="store_true", help="fit without each family of models in turn: some minutes")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-plan", metavar="DIR", help="where runs of cpu go")
    given = parser.parse_args()
    if given.part == "cpu":
        from benchmarks.plan_cpu import run_cpu  # loads torch and Megatron

        sys.exit(run_cpu(given))
    if given.part == "search":
        from benchmarks.plan_search import run_search

        sys.exit(run_search())
    for path in (given.data, given.rules):
        if not path.is_file():
            sys.exit(f"bench-plan: {path} is not there; give --data and --rules")
    sys.exit(run_score(given) if given.part == "score" else run_fit(given))


if __name__ == "__main__":
    main()
