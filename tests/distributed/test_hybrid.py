"""HybridModel under every schedule and with clones, against plain Megatron's HybridModel, from one checkpoint."""

import os
import re
import sys
from pathlib import Path

import pytest

from counterflow.balance.files.recorded import read_record
from hybrid_cases import CLONED, FAMILIES, GPT_ALONE, MADE_OF_LAYERS, PATTERN, STEPS, TWO, V
from ranks import start_ranks
from tests.support.asked import mark_nightly
from tests.support.comparing import TOLERANCE, assert_same_steps
from tests.support.profiled import check_layers
from tests.support.run_cases import Run, Runs
from tests.support.training import SHARDED, SMALL, TWO_STAGES, drop_flags
from train import read_flags


@pytest.mark.parametrize("family", mark_nightly(FAMILIES, lambda family: family not in ("1f1b", "gpipe", "interleaved")))
def test_hybrid_model_trains_like_megatron(hybrid_runs: Runs, family: str) -> None:
    run, reference = hybrid_runs[family], hybrid_runs["megatron"]
    assert len(run["steps"]) == STEPS
    assert_same_steps(run, reference)
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=TOLERANCE)


@pytest.mark.parametrize("name", mark_nightly(CLONED, lambda name: name != "clones"))
def test_hybrid_model_trains_like_megatron_with_clones(hybrid_runs: Runs, name: str) -> None:
    run = hybrid_runs[name]
    assert_same_steps(run, hybrid_runs["megatron"])
    assert run["clones"]["computed"] and not run["clones"]["wrong"]


def test_overlapped_pairs_change_no_bit(hybrid_runs: Runs) -> None:
    assert hybrid_runs["dualpipev, overlapped pairs"]["steps"] == hybrid_runs["dualpipev"]["steps"]
    said = (hybrid_runs["dualpipev, overlapped pairs"]["logs"] / "0" / "stdout.log").read_text()
    # Stages *-, *E, *E and *E: dispatch and combine of one layer, forward and backward.
    assert "communications of a chunk's F and B: stage 0 0 and 0, stage 1 2 and 2" in said, said[-3000:]


def test_metrics_of_the_experts_are_logged_as_by_megatron(hybrid_runs: Runs) -> None:
    expected = read_metrics(hybrid_runs["megatron"])
    assert len(expected) == STEPS
    assert read_metrics(hybrid_runs["dualpipev"]) == expected


def test_a_pattern_without_a_cut_is_cut_and_rank_0_says_where(hybrid_runs: Runs) -> None:
    said = (hybrid_runs["zbv"]["logs"] / "0" / "stdout.log").read_text()
    assert "has no |: cut evenly into the 4 stages of --cf-schedule zbv, '*-|*E|*E|*E'" in said


@pytest.mark.parametrize("name", ["megatron -> dualpipev", "zbv -> megatron"])
def test_a_resume_under_another_schedule_is_exact(hybrid_runs: Runs, name: str) -> None:
    assert_same_steps(hybrid_runs[name], hybrid_runs["megatron"])


@pytest.mark.parametrize("kind", ["tied", "four stages"])
def test_other_models_train_alike(hybrid_runs: Runs, kind: str) -> None:
    assert_same_steps(hybrid_runs[f"dualpipev, {kind}"], hybrid_runs[f"megatron, {kind}"])


def test_prediction_layers_train_alike_and_are_numbered_behind_the_others(hybrid_runs: Runs) -> None:
    run, reference = hybrid_runs["dualpipev, MTP, clones"], hybrid_runs["megatron, MTP"]
    losses = [step["mtp_loss"] for step in reference["steps"]]
    assert None not in losses
    for one in (run, hybrid_runs["dualpipev, MTP, overlapped pairs"]):
        assert_same_steps(one, reference)
        assert [step["mtp_loss"] for step in one["steps"]] == pytest.approx(losses, rel=TOLERANCE)
    record = read_record(run["directory"] / "record, MTP")
    assert record.layers.tolist() == [4, 6, 8, 10, 12], "as symbols of *-*E*E*E/*E/*E are counted"


def test_weights_of_a_gpt_model_go_on_in_a_hybrid_model(hybrid_runs: Runs) -> None:
    assert_same_steps(hybrid_runs["gpt -> dualpipev"], hybrid_runs["gpt -> megatron"])


def read_metrics(run: Run) -> list[list[str]]:
    """Return, for each step, the losses of the router as the last rank's log has them."""
    log = (run["logs"] / "3" / "stdout.log").read_text()
    lines = [line for line in log.splitlines() if "load_balancing_loss" in line]
    return [re.findall(r"(\w*(?:balancing|z)_loss\w*: [\d.E+-]+)", line) for line in lines]


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout")
def test_megatrons_own_pretrain_hybrid_goes_on_under_dualpipev_as_alone(tmp_path: Path) -> None:
    script = Path(os.environ["MEGATRON_LM_PATH"]) / "pretrain_hybrid.py"
    base = [*read_flags("deepseek-v3-small.args"), *read_flags("cpu.args"), *SMALL]
    flags = [*drop_flags(base, (*GPT_ALONE, *SHARDED)), *MADE_OF_LAYERS, *TWO_STAGES, "--mock-data"]
    first = [PATTERN, TWO, "--train-iters", "2", "--save", str(tmp_path / "saved"), "--save-interval", "2"]
    # Both resume: with this script plain Megatron 0.19 does not go on with the losses of a run that was not interrupted.
    resumed = ["--load", str(tmp_path / "saved"), "--ckpt-step", "2", "--train-iters", "4"]
    plan = {"first": first, "alone": [PATTERN, TWO, *resumed], "dualpipev": [*V, *resumed]}
    losses: dict[str, list[float]] = {}
    for name, chosen in plan.items():
        lines: list[str] = []
        command = [sys.executable, "-W", "ignore", "-m", "counterflow.launch", str(script), *flags, *chosen]
        start_ranks(4, command, tmp_path / name, lines.append)
        losses[name] = [float(match[1]) for line in lines if (match := re.search(r"iteration .*lm loss: ([\d.E+-]+)", line))]
    assert losses["dualpipev"] == pytest.approx(losses["alone"], rel=TOLERANCE)
    assert len(losses["dualpipev"]) == 2


def test_a_profiled_step_has_the_time_of_each_layer(hybrid_runs: Runs) -> None:
    directory = hybrid_runs["dualpipev, MTP, overlapped pairs"]["directory"]
    check_layers(directory / "profile, MTP", [*(str(number) for number in range(1, 9)), "mtp 1", "mtp 2"])
