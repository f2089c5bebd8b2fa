"""Calibration: constants that runs identify are found again, others stay."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.errors import PlanError
from counterflow.planner.calibration import Run, fit_constants, read_runs, tell_apart
from counterflow.planner.config import parse_config
from counterflow.planner.constants import Constants
from counterflow.planner.estimate import estimate_config
from tests.support.running import refuses

DENSE: dict[str, Any] = {
    "model": {"name": "Llama-3-70B"}, "cluster": {"gpu": "H100", "gpus": 64},
    "training": {"seq_length": 8192, "global_batch_size": 128, "precision": "bf16"},
    "layout": {"tp": 4, "pp": 4, "micro_batch_size": 1},
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "model": {"name": "Qwen3-30B-A3B"}, "cluster": {"gpu": "H100", "gpus": 64},
    "training": {"seq_length": 4096, "global_batch_size": 512, "precision": "bf16", "routing": "forced"},
    "layout": {"ep": 64, "micro_batch_size": 1, "dispatcher": "deepep"},
}  # fmt: skip


def make_runs(truth: dict[str, float]) -> list[Run]:
    plans = [DENSE, EXPERTS, {**EXPERTS, "layout": {**EXPERTS["layout"], "ep": 8}}]
    constants = Constants(priors=True).multiply(truth)
    configs = [parse_config(plan) for plan in plans]
    return [Run(f"run {n}", f"group {n}", one, estimate_config(one, constants).step_s) for n, one in enumerate(configs)]


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_a_constant_that_runs_show_is_found_again(factor: float) -> None:
    start = Constants(priors=True)
    fit = fit_constants(make_runs({"general.network": factor}), start)
    assert {"general.network", "general.scale"} <= set(fit.identified)
    assert "attention.blackwell" not in fit.identified
    assert (fit.constants["general.network"] / start["general.network"] - 1) * (factor - 1) > 0
    before = [abs(estimate_config(run.config, start).step_s / run.seconds - 1) for run in make_runs({"general.network": factor})]
    assert max(map(abs, fit.residuals.values())) < 0.3 * max(before)


def test_runs_that_agree_with_the_model_change_nothing() -> None:
    start = Constants(priors=True)
    fit = fit_constants(make_runs({}), start)
    assert all(abs(residual) < 1e-6 for residual in fit.residuals.values())
    assert all(after == pytest.approx(before) for before, after in fit.identified.values())


def test_runs_are_read_from_json_and_csv(tmp_path: Path) -> None:
    given = tmp_path / "runs.json"
    given.write_text(json.dumps([{"plan": DENSE, "step_s": 3.5, "name": "a"}]))
    columns = {f"{section}.{key}": value for section, part in DENSE.items() for key, value in part.items()}
    table = tmp_path / "runs.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "step_s", "tokens_per_s_per_gpu"])
        writer.writeheader()
        writer.writerow({**columns, "tokens_per_s_per_gpu": 8192 * 128 / 64 / 3.5})
    first, second = read_runs(given)[0], read_runs(table)[0]
    assert first.config == second.config and first.seconds == pytest.approx(second.seconds) == 3.5
    assert first.name == "a"


@pytest.mark.parametrize(("content", "said"), [
    ("[1]", "a mapping with plan and step_s"), ('[{"plan": {}}]', "key model is missing"), ("{", "cannot be read"),
    (json.dumps([{"plan": DENSE}]), "neither step_s nor"), (json.dumps([{"plan": DENSE, "step_s": -1}]), "a number above 0"),
])  # fmt: skip
def test_what_is_no_run_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(content)
    with refuses(said, PlanError):
        read_runs(path)


def test_neighbours_within_the_error_are_told_so() -> None:
    assert not tell_apart(10.0, 10.5, 0.15)
    assert tell_apart(10.0, 13.0, 0.15)
