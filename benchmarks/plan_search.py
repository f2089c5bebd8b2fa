"""How long ``counterflow plan`` takes: a whole search of DeepSeek-V3 on 2,048 GPUs, one that is given seconds, an estimate."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from benchmarks.runtime import PIPED_WIDTH, Figure, print_figures
from counterflow.planner.config import parse_config, read_config
from counterflow.planner.estimate import estimate_config
from tests.support import ROOT

PLAN = ROOT / "configs" / "plan-deepseek-v3-h800x2048.yaml"
MOST_SECONDS, SHORT, MOST_OVER, MOST_ESTIMATE = 60.0, 15.0, 3.0, 0.05
# A layout of the plan above.
LAYOUT = {"tp": 2, "pp": 8, "ep": 32, "micro_batch_size": 1, "schedule": "dualpipev", "overlap": True}
ESTIMATES = 20


def search(seconds: float) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a search from start to end, and what it printed."""
    begun = time.monotonic()
    words = ["plan", "search", str(PLAN), "--seconds", f"{seconds:g}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "counterflow.commands.main", *words], capture_output=True, text=True, check=True, cwd=ROOT
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return time.monotonic() - begun, found


def time_estimates() -> float:
    """Return the median seconds of an estimate, after the first."""
    config = read_config(PLAN)
    config = parse_config({**config.model_dump(exclude_none=True), "layout": LAYOUT})
    estimate_config(config)
    times = []
    for _ in range(ESTIMATES):
        begun = time.perf_counter()
        estimate_config(config)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def judge() -> Iterator[Figure]:
    """Yield the figures asked for."""
    seconds, found = search(MOST_SECONDS)
    yield Figure("search of DeepSeek-V3 on 2,048 GPUs", f"<= {MOST_SECONDS:g} s", f"{seconds:.1f} s", seconds <= MOST_SECONDS)
    yield Figure("  sizes left untried", "none", f"{found['untried']}", not found["untried"])
    fastest = found["candidates"][0]["step_s"]
    seconds, found = search(SHORT)
    over = abs(seconds - SHORT) <= MOST_OVER or (seconds < SHORT and not found["untried"])
    yield Figure(f"  --seconds {SHORT:g}", f"{SHORT:g} +- {MOST_OVER:g} s", f"{seconds:.1f} s", over)
    slower = found["candidates"][0]["step_s"] / fastest - 1.0
    yield Figure("  its first layout over the best", "<= 3 %", f"{100 * slower:.1f} %", slower <= 0.03)
    median = time_estimates()
    yield Figure("an estimate", f"<= {1e3 * MOST_ESTIMATE:g} ms", f"{1e3 * median:.0f} ms", median <= MOST_ESTIMATE)


def run_search() -> int:
    """Measure and print; return 1 where a figure is missed."""
    figures = list(judge())
    print_figures(figures, Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    return 0 if all(figure.reached for figure in figures) else 1
