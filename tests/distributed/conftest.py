"""Runs every training case of this folder once per test session, many in each start of four CPU ranks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import list_cases
from counterflow.schedule import build, to_csv
from data import prepare_text
from ranks import start_ranks

RANKS = 4
# Megatron leaves threads and sockets behind when it is set up again in one process; many make it crawl.
CASES_PER_START = 11


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real text."""
    return prepare_text(tmp_path_factory.mktemp("text"), max_bytes=2**21)


@pytest.fixture(scope="session")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each training case logged, by its name."""
    directory = tmp_path_factory.mktemp("training")
    # A table as a user would write it to a file; 2 pipeline ranks, 6 micro-batches.
    (directory / "table.csv").write_text(to_csv(build("dualpipev", 2, 6)))
    worker = str(Path(__file__).with_name("worker.py"))
    cases, done = list_cases(text, directory), {}
    for first in range(0, len(cases), CASES_PER_START):
        given, results = directory / f"cases-{first}.json", directory / f"results-{first}.json"
        given.write_text(json.dumps(cases[first : first + CASES_PER_START]))
        start_ranks(RANKS, [sys.executable, "-W", "ignore", worker, str(given), str(results)], directory / "logs")
        done |= {run["name"]: {**run, "directory": directory} for run in json.loads(results.read_text())}
    return done
