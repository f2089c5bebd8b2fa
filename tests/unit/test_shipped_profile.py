"""The profile in examples/: what the docs show of it is what the command prints, and its costs serve schedules and auto."""

import json
import re
from pathlib import Path

import pytest

from counterflow.options import merge_options, read_flags
from counterflow.trainer.tables import choose_layout
from tests.support import ROOT
from tests.support.running import run_command

PROFILE = ROOT / "examples" / "profile"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, out, err = run_command(list(map(str, words)), capsys)
    assert (code, err) == (0, "")
    return out


def test_the_docs_show_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "analyze", PROFILE)
    (block,) = re.findall(
        r"```console\n\$ counterflow analyze examples/profile\n(.*?)```", (ROOT / "docs/analysis.md").read_text(), flags=re.DOTALL
    )
    pieces = [piece for piece in block.split("…\n") if piece.strip()]
    assert pieces and all(piece in printed for piece in pieces)


def test_figures_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "analyze", PROFILE, "--json"))
    assert [device["device"] for device in found["devices"]] == [0, 2]
    for device in found["devices"]:
        assert device["hidden_us"] + device["exposed_us"] == pytest.approx(device["communication_us"])
        assert device["busy_us"] + device["idle_us"] == pytest.approx(device["window_us"])
        # Exposed communication and computation share no time.
        assert device["compute_us"] + device["exposed_us"] <= device["window_us"] + 0.01
        assert {"action", "all_to_all", "send_recv"} <= set(device["kinds"])
        assert {phase["name"] for phase in device["phases"]} >= {f"stage {device['device']} ({part})" for part in "FBW"}


def test_its_costs_serve_a_comparison_and_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = tmp_path / "costs.json"
    run(capsys, "analyze", PROFILE, "--costs", costs)
    compared = run(capsys, "schedule", "compare", "--costs", costs, "--ranks", 2, "--microbatches", 8, "--json")
    steps = {row["schedule"]: row["makespan"] for row in json.loads(compared)}
    options = merge_options(read_flags(["--cf-schedule", "auto", "--cf-costs", str(costs)]))
    assert choose_layout(options, 2, 1).last_stage == 3
    # The what-if list says the same of it as schedule compare.
    (gain,) = [row for row in json.loads(run(capsys, "analyze", PROFILE, "--json"))["what_if"] if "schedule" in row["change"]]
    found = re.search(r"schedule (\S+) instead of (\S+)", gain["change"])
    assert found and f"{steps[found[1]]:.0f} ms a step instead of {steps[found[2]]:.0f}" in gain["assumption"]
    assert gain["flags"] == f"--cf-schedule {found[1]}"


def test_its_page_picture_and_trace_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture, trace = (tmp_path / name for name in ("p.html", "p.svg", "t.json"))
    run(capsys, "analyze", PROFILE, "--html", page, "--svg", picture, "--trace", trace)
    assert "stage 2 (F)" in page.read_text() and picture.read_text().startswith("<svg")
    assert json.loads(trace.read_text())["traceEvents"]
