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
    ({"model": "Mixtral"}, "expected: keys and values, like model: {name: …}"),
    ({"model": {"name": "Mixtral"}}, "nearest: Mixtral-8x7B, Mixtral-8x22B"),
    ({"model": {"nmae": "Mixtral-8x7B"}}, "key model.nmae is not known; nearest: name"),
    ({"cluster": {"gpu": "H100", "gpus": 16, "memory_gib": float("nan")}}, "allowed: a finite number"),
    ({"training": {"tokens": float("inf")}}, "allowed: a finite number"),
    ({"layout": {"optimizer_offload": float("nan")}}, "allowed: a finite number"),
    ({"layout": {"tp": "x"}}, "layout.tp x given; allowed: a whole number"),
    ({"layout": {"tp": 2.5}}, "allowed: a whole number"),
    ({"layout": {"micro_batch_size": 0}}, "allowed: 1 or more"),
    ({"layout": {"overlap": "perhaps"}}, "allowed: true or false"),
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


def test_an_empty_plan_says_that_it_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("")
    check_refusal(["plan", "estimate", str(tmp_path / "plan.yaml")], "is empty", capsys)


@pytest.mark.parametrize(("layout", "wanted"), [
    ({"pp": 2, "ep": 8, "schedule": "1f1b"}, ["schedule 1f1b has no pairs"]),
    ({"pp": 2, "schedule": "1f1b"}, ["schedule 1f1b has no pairs", "ep is 1"]),
    ({"pp": 2, "schedule": "dualpipev"}, ["ep is 1"]),
])  # fmt: skip
def test_overlap_that_is_planned_off_says_every_reason(
    layout: dict[str, Any], wanted: list[str], write_plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_command(["plan", "estimate", write_plan(layout={**layout, "overlap": True})], capsys)
    note = next(line for line in out.splitlines() if "overlap is planned off" in line)
    assert all(words in note for words in wanted)
    assert ("ep is 1" in note) == ("ep is 1" in wanted) or len(wanted) > 1


def test_keys_that_would_narrow_the_memory_are_named(write_plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = {"gpu": "H100", "gpus": 16, "memory_gib": 60}
    _, out, _ = run_command(["plan", "estimate", write_plan(cluster=cluster)], capsys)
    assert "may or may not fit" in out and "stating layout.recompute" in out and "layout.micro_batch_size" not in out
    stated = {**PLAN["layout"], "recompute": "none"}
    _, out, _ = run_command(["plan", "estimate", write_plan(cluster=cluster, layout=stated)], capsys)
    assert "stating layout.recompute" not in out


def test_costs_of_another_model_with_as_many_stages_are_refused(
    write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"unit": "ms", "f": [900.0] * 4, "i": [900.0] * 4, "w": [900.0] * 4}))
    check_refusal(["plan", "estimate", write_plan(costs=str(costs))], "these are costs of another model", capsys)
    costs.write_text(json.dumps({"unit": "ms", "f": [20.0] * 4, "i": [20.0] * 4, "w": [15.0] * 4}))
    code, _, err = run_command(["plan", "estimate", write_plan(costs=str(costs))], capsys)
    assert (code, err) == (0, "")


def test_a_search_says_what_a_table_saves_against_the_interleaved_schedule(
    write_plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(layout={"micro_batch_size": 1, "recompute": "full", "tp": 1, "cp": 1, "pp": 4, "ep": 4})
    code, out, _ = run_command(["plan", "search", path, "--seconds", "20", "--top", "3", "--price", "2"], capsys)
    assert code == 0
    line = next(line for line in out.splitlines() if "Megatron's interleaved schedule" in line)
    assert "at its best" in line and "vpp" in line
