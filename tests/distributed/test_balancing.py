"""Real training runs with clones that change at every step, against plain Megatron, from one checkpoint."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_cases import (
    CLONES,
    MOVING,
    PLAIN,
    RESUMED,
    SAVED,
    SEEDS,
    SETTLED,
    SETTLED_STEPS,
    SHARDED_RUNS,
    STEPS,
)
from tests.support.asked import mark_nightly
from tests.support.checkpoints import list_entries, measure_difference, read_tensors
from tests.support.comparing import HALF_TOLERANCE, TOLERANCE, assert_same_steps
from tests.support.forked_ranks import fork_ranks
from tests.support.run_cases import RANKS, Runs, run_case
from tests.support.training import SHARDED, TWO_STAGES, list_base_flags, save_to, start_from

REFERENCES = dict.fromkeys(PLAIN, "megatron, plain") | dict.fromkeys(SHARDED_RUNS, "megatron, sharded")
# A step in which one of the ranks dies, after the checkpoint of the step before.
KILLED = 5
KILLS = ((2, "refresh"), (3, "_take_home"))


def assert_clones_changed_and_were_their_homes(run: dict[str, Any]) -> None:
    clones = run["clones"]
    # The first step has homes alone: nothing is known yet.
    assert clones["placements"] == STEPS and clones["changes"] == STEPS - 1, "not a new placement in every step"
    assert clones["computed"] >= STEPS - 1 and clones["tokens"] > 0, "hardly any clone computed"
    assert clones["wrong"] == 0, f"{clones['wrong']} of {clones['computed']} clones had other weights than their homes"


# Each is left out for one of the others that has its feature too.
NIGHTLY = ("1f1b, even split", "selective recompute", "TP 2", "dualpipev", "two replicas, overlap")
COMPARED = mark_nightly(REFERENCES.items(), lambda case: case[0] not in NIGHTLY)


@pytest.mark.parametrize(("name", "reference"), COMPARED)
def test_clones_that_change_at_every_step_train_like_megatron(balanced_runs: Runs, name: str, reference: str) -> None:
    run = balanced_runs[name]
    assert len(run["steps"]) == STEPS
    assert_same_steps(run, balanced_runs[reference])
    assert run["evaluations"] == pytest.approx(balanced_runs[reference]["evaluations"], rel=TOLERANCE)
    assert_clones_changed_and_were_their_homes(run)


@pytest.mark.parametrize(("name", "reference"), COMPARED)
def test_checkpoints_are_megatrons(balanced_runs: Runs, name: str, reference: str) -> None:
    directory = balanced_runs[name]["directory"]
    # Random states are kept by pipeline rank: under another layout there are others, with clones or without.
    kept = [drop_random_states(list_entries(directory / one, STEPS)) for one in (name, reference)]
    assert kept[0] == kept[1], "other keys, types or shapes"
    found, expected = (drop_random_states(read_tensors(directory / one, STEPS)) for one in (name, reference))
    differences = {key: measure_difference(found[key], expected[key]) for key in expected}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= TOLERANCE, f"{worst} differs by {differences[worst]:.1e} of its largest value"


def drop_random_states[Value](entries: dict[str, Value]) -> dict[str, Value]:
    return {key: value for key, value in entries.items() if not key.startswith("rng_state")}


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_clones_draw_no_random_number(balanced_runs: Runs, name: str) -> None:
    directory, reference = balanced_runs[name]["directory"], f"megatron, {name}"
    assert list_entries(directory / name, STEPS) == list_entries(directory / reference, STEPS)
    found, expected = (read_tensors(directory / one, STEPS) for one in (name, reference))
    states = [key for key in expected if key.startswith("rng_state")]
    assert states and all(torch.equal(found[key], expected[key]) for key in states)


@pytest.mark.parametrize(("saved", "loaded"), [(saved, loaded) for saved, (loaded, _) in RESUMED.items()])
def test_checkpoints_are_taken_over_with_and_without_the_plugin(balanced_runs: Runs, saved: str, loaded: str) -> None:
    run = balanced_runs[f"{saved} -> {loaded}"]
    assert [step["iteration"] for step in run["steps"]] == list(range(SAVED + 1, STEPS + 1))
    assert_same_steps(run, balanced_runs["megatron, sharded" if "sharded" in saved else "megatron, plain"])


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("bf16", "megatron, bf16", HALF_TOLERANCE),
        ("bf16, overlapped pairs", "megatron, bf16", HALF_TOLERANCE),
        ("fp16", "megatron, fp16", HALF_TOLERANCE),
        ("MTP", "megatron, MTP", TOLERANCE),
    ],
)
def test_other_trainings_are_megatrons_too(balanced_runs: Runs, name: str, reference: str, tolerance: float) -> None:
    assert_same_steps(balanced_runs[name], balanced_runs[reference], tolerance)
    assert_clones_changed_and_were_their_homes(balanced_runs[name])


def test_a_step_that_the_loss_scale_skips_leaves_clones_as_their_homes(balanced_runs: Runs) -> None:
    assert any(step["skipped"] for step in balanced_runs["fp16"]["steps"]), "no step was skipped: nothing is tested"


def test_a_model_that_is_only_evaluated_has_clones_too(balanced_runs: Runs) -> None:
    losses = balanced_runs["evaluated alone"]["evaluations"]
    assert losses and losses == pytest.approx(balanced_runs["megatron, evaluated alone"]["evaluations"], rel=TOLERANCE)


def test_predicted_tokens_lose_as_much(balanced_runs: Runs) -> None:
    logged, expected = ([step["mtp_loss"] for step in balanced_runs[name]["steps"]] for name in ("MTP", "megatron, MTP"))
    assert logged == pytest.approx(expected, rel=TOLERANCE)


def test_plans_are_made_at_their_interval_and_balance(balanced_runs: Runs) -> None:
    run = balanced_runs["planned, every second step"]
    assert_same_steps(run, balanced_runs["megatron, plain"])
    assert run["clones"]["wrong"] == 0 and run["clones"]["computed"] > 0
    assert run["clones"]["placements"] == STEPS // 2, "homes first, then a plan after steps 2 and 4"
    said = run["clones"]["said"]
    assert said[0]["balancedness"] == said[0]["balancedness before"] < 1 and said[0]["clones"] == 0
    for step in said[2:]:
        assert step["clones"] > 0 and step["MB"] > 0
        assert step["balancedness"] > step["balancedness before"] + 0.05, f"the plan did not balance: {step}"


@pytest.mark.parametrize("seed", SEEDS)
def test_homes_move_by_themselves_to_ranks_without_tokens(balanced_runs: Runs, seed: str) -> None:
    run = balanced_runs[f"two ranks shunned, {seed}"]
    assert len(run["steps"]) == SETTLED_STEPS
    assert_same_steps(run, balanced_runs[f"megatron, two ranks shunned, {seed}"])
    said = run["clones"]["said"]
    assert [step["homes moved"] > 0 for step in said] == [step == SETTLED for step in range(1, SETTLED_STEPS + 1)]
    early, late = (np.mean([step["balancedness"] for step in part]) for part in (said[: SETTLED - 1], said[SETTLED - 1 :]))
    # The four experts that have tokens are not alike, and each fills a rank.
    assert late > early + 0.05, f"homes that moved do not balance: {early}, {late}"


@pytest.mark.parametrize("loaded", ["homes alone", "other EP and clones", "megatron"])
def test_a_checkpoint_saved_behind_a_move_of_homes_resumes(balanced_runs: Runs, loaded: str) -> None:
    run = balanced_runs[f"two ranks shunned -> {loaded}"]
    assert [step["iteration"] for step in run["steps"]] == list(range(SETTLED + 1, SETTLED_STEPS + 1))
    assert_same_steps(run, balanced_runs[f"megatron, two ranks shunned, {SEEDS[-1]}"])
    if loaded == "homes alone":
        assert run["clones"]["said"][0]["homes moved"] > 0, "the loads that were saved do not move homes in the first step"


@pytest.mark.parametrize(("name", "clones", "weights", "gradients"), [("plain", 1, 4, 4), ("bf16", 2, 2, 4)])
def test_the_log_says_what_the_clones_take(balanced_runs: Runs, name: str, clones: int, weights: int, gradients: int) -> None:
    # Two MoE layers on the second stage; an expert has a gate, an up and a down projection of 32 x 16.
    numbers = 2 * clones * 3 * 32 * 16
    log = (balanced_runs[name]["logs"] / "0" / "stdout.log").read_text()
    assert (
        f"counterflow: eplb: {clones} clone{'s' * (clones > 1)} per rank and MoE layer; on a rank of 2 MoE layers "
        f"{numbers * weights:,} bytes of weights and {numbers * gradients:,} bytes of gradients, no optimizer state\n"
    ) in log


@pytest.mark.parametrize(("rank", "method"), KILLS)
def test_a_rank_killed_in_a_transfer_ends_all_and_the_last_checkpoint_resumes(
    balanced_runs: Runs, text: Path, tmp_path: Path, rank: int, method: str
) -> None:
    flags = [*list_base_flags(text, tmp_path), *TWO_STAGES, *SHARDED, *CLONES[2], *MOVING, "--train-iters", str(STEPS)]
    start = start_from(balanced_runs["initial"]["directory"] / "initial")
    save = save_to(tmp_path / "saved", KILLED - 1)
    kill = {"rank": rank, "method": method, "step": KILLED}
    case = {"name": "killed", "plugin": True, "flags": [*flags, *start, *save], "kill": kill}
    job = {"case": case, "results": str(tmp_path / "none.json")}
    statuses = fork_ranks("eplb_worker", job, RANKS, tmp_path / "killed", alone=True, timeout=120)
    for index, status in enumerate(statuses):
        said = (tmp_path / "killed" / str(index) / "stderr.log").read_text()[-500:]
        assert status is not None, f"rank {index} waits for ever for rank {rank}"
        assert status == -signal.SIGKILL if index == rank else status > 0, f"rank {index}: {status}, {said}"
    resumed = {"name": "resumed", "plugin": True, "flags": [*flags, "--load", str(tmp_path / "saved")], "seed": 7}
    run = run_case("eplb_worker", resumed, tmp_path)
    assert [step["iteration"] for step in run["steps"]] == list(range(KILLED, STEPS + 1))
    assert_same_steps(run, balanced_runs["megatron, sharded"])
