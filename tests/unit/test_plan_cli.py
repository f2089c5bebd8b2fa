"""``counterflow plan`` as a user types it: what it prints, and one line for each kind of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from counterflow.report.plan_text import write_change
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
    ({"training": {"precision": "fp9"}}, "training.precision fp9 given; allowed: bf16"),
    ({"layout": {"recompute": "ful"}}, "layout.recompute ful given; allowed: none, or of full"),
    ({"layout": {"activation_offload_layers": 48}}, "activation_offload_layers 48 given; allowed: 0 to 47"),
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


def write_config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 16, "hidden_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000, "intermediate_size": 4096, **keys,
    }))  # fmt: skip
    return path


def test_a_name_beside_a_config_is_a_title_and_no_other_model(
    write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path)
    layout = {"pp": 2, "micro_batch_size": 1}
    code, out, _ = run_command(
        ["plan", "estimate", write_plan(model={"name": "mine", "hf": "config.json"}, layout=layout)], capsys
    )
    assert code == 0 and out.startswith("mine (Qwen3ForCausalLM of ")
    path = write_plan(model={"name": "Qwen3-30B-A3B", "hf": "config.json"}, layout=layout)
    check_refusal(["plan", "estimate", path], "are different models (num_layers 16 and 48", capsys)


@pytest.mark.parametrize(("name", "text"), [
    ("plan.yaml", "model: {name: Qwen3-30B-A3B}\ncluster: {gpu: H100, gpus: 16}\nlayout: {pp: 2, ep: 8, pp: 4}\n"),
    ("plan.json", '{"model": {"name": "Qwen3-30B-A3B"}, "cluster": {"gpu": "H100"}, "layout": {"pp": 2, "pp": 4}}'),
])  # fmt: skip
def test_a_key_given_twice_is_refused(name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text(text)
    check_refusal(["plan", "estimate", str(tmp_path / name)], f"{name}: key pp is given twice", capsys)


@pytest.mark.parametrize(("layout", "said"), [
    ({"pp": 2, "ep": 8, "schedule": "auto"}, "note: schedule auto is planned as 1f1b"),
    ({"pp": 2, "ep": 8, "schedule": "1f1b", "vpp": 2}, "note: schedule 1f1b is planned as interleaved"),
    ({"pp": 2, "ep": 8, "flags": "sp"}, "note: no distributed optimizer: flags list Megatron's (sp) without dist_optimizer"),
])  # fmt: skip
def test_what_is_planned_otherwise_than_asked_is_said(
    layout: dict[str, Any], said: str, write_plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_command(["plan", "estimate", write_plan(layout=layout)], capsys)
    assert code == 0 and said in out


def test_what_deepspeed_takes_from_the_script_is_said(write_plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan(layout={"tp": 2, "pp": 2, "ep": 8, "recompute": "full"})
    code, out, _ = run_command(["plan", "estimate", path, "--trainer", "deepspeed"], capsys)
    line = next(line for line in out.splitlines() if line.startswith("not in the JSON, but in the script:"))
    assert code == 0 and "num_stages=2" in line and "num_mp=2" in line and "activation_checkpoint_interval=1" in line
    _, out, _ = run_command(["plan", "estimate", path, "--trainer", "deepspeed", "--json"], capsys)
    assert len(json.loads(out)["candidates"][0]["deepspeed_script"]) == 3


def test_a_search_that_was_not_finished_says_so_first(write_plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "search", write_plan(layout={"pp": 2, "recompute": "none"}, costs="costs.json"), "--seconds", "0"]
    code, out, err = run_command(argv, capsys)
    assert code == 0 and out.startswith("the search is not finished: ") and "costs.json is of one layout" in err
    _, out, _ = run_command([*argv, "--json"], capsys)
    assert json.loads(out)["finished"] is False


def test_small_changes_have_no_sign(write_plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_change(0.99999) == "0.0 %" and write_change(1.5) == "+50.0 %"
    (tmp_path / "runs.json").write_text(json.dumps([{"plan": PLAN, "step_s": 10.0}]))
    _, out, _ = run_command(["plan", "estimate", write_plan(), "--calibrate", str(tmp_path / "runs.json")], capsys)
    assert "calibrated on 1 run," in out


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
