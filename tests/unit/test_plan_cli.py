"""``counterflow plan`` as a user types it: what it prints, and one line for each kind of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.running import check_refusal, run_command

ROOT = Path(__file__).resolve().parents[2]
PLAN: dict[str, Any] = {
    "model": {"name": "Qwen3-30B-A3B"},
    "cluster": {"gpu": "H100", "gpus": 16},
    "training": {"seq_length": 4096, "global_batch_size": 256, "precision": "bf16"},
    "layout": {"pp": 2, "ep": 8, "micro_batch_size": 1, "schedule": "dualpipev"},
}


@pytest.fixture
def write_plan(tmp_path: Path) -> Any:
    def write(**sections: Any) -> str:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**PLAN, **sections}))
        return str(path)

    return write


def test_estimate_prints_time_memory_and_flags(write_plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command(["plan", "estimate", write_plan(), "--price", "2"], capsys)
    assert (code, err) == (0, "")
    assert "tokens/s/GPU" in out and "memory of rank" in out and "at 2 a GPU hour" in out
    assert out.rstrip().splitlines()[-1].strip().startswith("--cf-schedule dualpipev")


def test_explain_prints_a_waterfall_and_what_would_change_it(
    write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    code, out, _ = run_command(["plan", "explain", write_plan(), "--html", str(page)], capsys)
    assert code == 0 and "links half as fast" in out and "bubble" in out
    assert "<svg" in page.read_text() and "{{" not in page.read_text()


def test_search_prints_the_best_first_and_json_says_why_not(
    write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(layout={"micro_batch_size": 1, "recompute": "none", "tp": 1, "cp": 1})
    page = tmp_path / "page.html"
    argv = ["plan", "search", path, "--seconds", "6", "--top", "3", "--html", str(page), "--json"]
    code, out, err = run_command(argv, capsys)
    assert (code, err) == (0, "")
    found = json.loads(out)
    steps = [one["step_s"] for one in found["candidates"] if one["fits"]]
    assert steps == sorted(steps) and found["candidates"][0]["megatron_args"]
    assert found["rejected"] and all(one["why"] for one in found["rejected"])
    assert "Time against memory" in page.read_text()


def test_estimates_are_calibrated_on_given_runs(write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan()
    _, out, _ = run_command(["plan", "estimate", path, "--json"], capsys)
    before = json.loads(out)["candidates"][0]["step_s"]
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([{"plan": PLAN, "step_s": 1.3 * before}]))
    _, out, _ = run_command(["plan", "estimate", path, "--json", "--calibrate", str(runs)], capsys)
    found = json.loads(out)
    assert found["candidates"][0]["step_s"] > 1.1 * before
    assert found["calibration"]["identified"] and len(found["calibration"]["residuals"]) == 1


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/plan-*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_are_plans(config: Path) -> None:
    from counterflow.planner.config import read_config
    from counterflow.planner.search import count_gpus

    assert count_gpus(read_config(config))


@pytest.mark.parametrize(("sections", "said"), [
    ({"cluster": {"gpu": "H1000", "gpus": 16}}, "nearest: H100"),
    ({"model": {"name": "Qwen4-30B"}}, "nearest: Qwen3-30B"),
    ({"layout": {"pp": 3, "ep": 8}}, "does not divide 16 GPUs"),
    ({"layout": {"pp": 2, "ep": 7}}, "ep 7 does not divide"),
    ({"layout": {"schedule": "dualpipe-x", "pp": 2}}, "is not known"),
    ({"training": {"seq_length": 4096, "global_batch_size": 100}, "layout": {"pp": 2, "ep": 8, "micro_batch_size": 3}}, "divide"),
    ({"layouts": {}}, "is not known"),
    ({"costs": "nowhere.json"}, "costs"),
])  # fmt: skip
def test_bad_plans_end_in_one_line(sections: Any, said: str, write_plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(["plan", "estimate", write_plan(**sections)], said, capsys)


@pytest.mark.parametrize(("argv", "said"), [
    (["--calibrate", "nowhere.csv"], "cannot be read"),
    (["--price", "-1"], "--price"),
    (["--html", "/nowhere/page.html"], "--html"),
])  # fmt: skip
def test_bad_options_end_in_one_line(argv: list[str], said: str, write_plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check_refusal(["plan", "estimate", write_plan(), *argv], said, capsys)
