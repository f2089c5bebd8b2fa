"""The runtime's benchmark runs: everyone sleeps what they should, and what is printed is what was measured."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.support import ROOT


def test_all_contestants_run_and_are_measured(tmp_path: Path) -> None:
    size = "--ranks 2 --microbatches 4 --milliseconds 1 --steps 1 --json"
    command = [sys.executable, "-m", "benchmarks.runtime", *size.split(), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr  # 1: a figure is not reached, as with stages as short as these
    measured = json.loads(done.stdout)
    names = [result["name"].split()[0] for result in measured["results"]]
    assert Counter(names) == {"counterflow": 4, "adapter": 3, "key": 5, "torch": 4, "megatron": 2, "deepspeed": 2}
    for result in measured["results"]:
        assert len(result["makespans"]) == 1
        # Sleeps are never short, so nobody beats the table's promise: who does has not run the table.
        assert min(result["makespans"]) >= result["simulated_makespan"], f"{result['name']} skipped some of its work"
    assert {found["rank"] for found in measured["executor"]} == {0, 1}
    assert done.returncode == (0 if all(figure["reached"] for figure in measured["figures"]) else 1)
    for name in ("dualpipev-1ms.html", "dualpipev-1ms.svg", "steps.svg"):
        assert (tmp_path / name).stat().st_size > 1_000, f"{name} was not drawn"
