"""Costs as a file: what analyze writes of records, simulations and traces, and what schedule commands take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow.analysis import analyze_trace, read_traces
from counterflow.analysis.cluster import compare_ranks
from counterflow.schedule import Costs, build, dump_record, simulate
from counterflow.schedule.costs_file import read_costs
from tests.support.running import check_refusal, refuses

Command = Callable[..., str]
FORWARD, INPUT, WEIGHT = [0.010, 0.012, 0.014, 0.016], [0.011, 0.013, 0.015, 0.017], [0.004, 0.005, 0.006, 0.007]


def make_record(folder: Path, name: str = "zbv") -> Path:
    """Write the record of a step whose actions took what FORWARD, INPUT and WEIGHT say, in seconds."""
    timeline = simulate(build(name, 2, 6), Costs(FORWARD, INPUT, WEIGHT))
    folder.mkdir()
    for rank in range(2):
        line = dump_record(7, name, 0, rank, [span for span in timeline.spans if span.rank == rank])
        (folder / f"timeline-rank{rank:05d}.jsonl").write_text(line + "\n")
    return folder


def test_a_record_gives_its_costs_and_they_its_step(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "costs.json"
    out = command("analyze", make_record(tmp_path / "record"), "--costs", path)
    assert "rank 0  window" in out and "rank 1  window" in out
    costs = json.loads(path.read_text())
    for key, values in (("f", FORWARD), ("i", INPUT), ("w", WEIGHT)):
        assert costs[key] == pytest.approx([1000 * value for value in values], abs=2e-3)
    shown = json.loads(command("schedule show zbv --ranks 2 --microbatches 6 --json --costs", path))
    assert shown["makespan"] == pytest.approx(
        1000 * simulate(build("zbv", 2, 6), Costs(FORWARD, INPUT, WEIGHT)).makespan, rel=1e-3
    )


def test_a_simulation_is_read_and_compared(tmp_path: Path, command: Command) -> None:
    for name, overlap in (("slow", 1.0), ("fast", 0.7)):
        command(f"schedule show dualpipev --ranks 2 --microbatches 6 --overlap {overlap} --trace", tmp_path / f"{name}.json")
    traces = read_traces(tmp_path / "fast.json")
    timeline = simulate(build("dualpipev", 2, 6), Costs(0.5, 0.5, 0.5, overlap=0.7))
    devices = [device for trace in traces for device in analyze_trace(trace)]
    ranks = compare_ranks(devices)
    assert sum(rank.bubble for rank in ranks) / 2 == pytest.approx(timeline.bubble, abs=1e-6)
    out = command("analyze", tmp_path / "fast.json", "--against", tmp_path / "slow.json", "--costs", tmp_path / "costs.json")
    assert "explain 100.0 %" in out
    assert json.loads((tmp_path / "costs.json").read_text())["overlap"] == pytest.approx(0.7)


def test_options_beside_a_file_win(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"unit": "us", "f": 500, "i": 500, "w": 500, "overlap": 0.8, "p2p": 7, "reduce": 0}')
    sizes = "--ranks 4 --microbatches 10 --json"

    def find_step(*words: Any) -> float:
        return float(json.loads(command(f"schedule show dualpipev {sizes}", *words))["makespan"])

    assert find_step("--costs", path, "--p2p", 0) == pytest.approx(28_800)
    assert find_step("--costs", path) > 28_800
    assert find_step("--costs", path, "--p2p", 0, "--overlap", 1) == pytest.approx(find_step() * 1000)
    out = command("schedule compare --ranks 4 --microbatches 10 --p2p 0 --costs", path)
    assert "dualpipev" in out and "2.88e+04" in out or "28800" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "allowed in a costs file"),
        ('{"f": 1, "i": 1}', "no w"),
        ('{"f": 1, "i": 1, "w": 1, "g": 1}', "g given"),
        ('{"f": "1", "i": 1, "w": 1}', "cost f"),
        ('{"f": [1, NaN], "i": 1, "w": 1}', "cost f"),
        ('{"f": 1, "i": 1, "w": 1, "unit": "h"}', "unit h"),
        ('{"f": 1, "i": 1, "w": 1, "overlap": 7}', "overlap"),
        ('{"f": 1', "cannot be read"),
    ],
)
def test_a_bad_costs_file_is_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with refuses(said):
        read_costs(path)
    check_refusal(f"schedule compare --ranks 2 --microbatches 4 --costs {path}".split(), said, capsys)
