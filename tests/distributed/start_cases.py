"""Start the ranks that run cases: several training runs in each start, since a start takes longer than a small training."""

import json
import sys
from pathlib import Path
from typing import Any

from ranks import start_ranks

RANKS = 4
# Megatron leaves threads and sockets behind when it is set up again in one process; many make it crawl.
CASES_PER_START = 11


def run_cases(
    worker: str, cases: list[dict[str, Any]], directory: Path, ranks: int = RANKS, per_start: int = CASES_PER_START
) -> dict[str, dict[str, Any]]:
    """Run the cases by a worker of this folder; return what each logged, by its name."""
    done: dict[str, dict[str, Any]] = {}
    for first in range(0, len(cases), per_start):
        given, results = directory / f"cases-{first}.json", directory / f"results-{first}.json"
        given.write_text(json.dumps(cases[first : first + per_start]))
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(worker)), str(given), str(results)]
        logs = start_ranks(ranks, command, directory / "logs")
        done |= {run["name"]: {**run, "directory": directory, "logs": logs} for run in json.loads(results.read_text())}
    return done
