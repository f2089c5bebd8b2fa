"""Real training runs with just-in-time clones, other ones in every micro-batch, against plain Megatron, from one checkpoint."""

import signal
from pathlib import Path
from typing import Any

import pytest

from counterflow.balance.files.recorded import read_record
from just_in_time_cases import KEEPING, MEASURED, PLAIN, SHARDED_RUNS, lend, list_cases, name_reference
from tests.support.asked import mark_nightly
from tests.support.comparing import assert_same_steps
from tests.support.forked_ranks import fork_ranks
from tests.support.run_cases import RANKS, Runs, run_case
from tests.support.training import SCHEDULES, TWO_STAGES, list_base_flags, save_to, start_from

STEPS = 8
MICROBATCHES = 6
LAYERS = 2
# A step behind which the losses of an evaluation are computed.
EVALUATED = 5
# Bytes of an expert's weights, as of its gradients: a gate, an up and a down projection of 32 x 16, in fp32.
EXPERT = 3 * 32 * 16 * 4
# In which a rank kills itself: while weights come for a forward, or gradients go home.
KILLS = ("lend", pytest.param("_return_gradients", marks=pytest.mark.nightly))
# A step behind one that was saved.
KILLED = 4


@pytest.fixture(scope="module")
def lent_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each case logged, by its name."""
    directory = tmp_path_factory.mktemp("lent")
    return Runs("eplb_worker", list_cases(text, directory, STEPS), directory)


def assert_loans_changed_and_were_their_homes(run: dict[str, Any]) -> None:
    clones = run["clones"]
    assert clones["loans"] >= STEPS * MICROBATCHES // 2, "not every micro-batch was planned"
    assert clones["different_loans"] > 8, "hardly any micro-batch had other clones than the one before"
    assert clones["computed"] > STEPS and clones["backwards"] > STEPS, "hardly any clone computed"
    assert clones["wrong"] == 0, f"{clones['wrong']} of {clones['computed']} clones had other weights than their homes"


@pytest.mark.parametrize("name", PLAIN | SHARDED_RUNS)
def test_other_clones_in_every_micro_batch_train_like_megatron(lent_runs: Runs, name: str) -> None:
    run, reference = lent_runs[name], lent_runs[name_reference(name)]
    assert len(run["steps"]) == STEPS
    assert_same_steps(run, reference)
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=1e-5)
    assert_loans_changed_and_were_their_homes(run)


def test_the_same_run_has_the_same_bits(lent_runs: Runs) -> None:
    assert_same_steps(lent_runs["dualpipe, again"], lent_runs["dualpipe"], 0)


@pytest.mark.parametrize("name", mark_nightly(KEEPING, lambda name: name.startswith("four ranks")))
def test_weights_that_are_kept_train_the_same_bits_for_fewer_bytes(lent_runs: Runs, name: str) -> None:
    kept, sent = lent_runs[name], lent_runs[name.removesuffix(", kept")]
    assert_same_steps(kept, sent, 0)
    assert kept["clones"]["computed"] == sent["clones"]["computed"] and not kept["clones"]["wrong"]
    # The first step behind an evaluation counts its clones too.
    for step in range(EVALUATED):
        once, twice = (count_weights_sent(run, step) for run in (kept, sent))
        lent = [run["clones"]["said"][step]["clones just in time"] for run in (kept, sent)]
        assert lent[0] == lent[1] > 0
        if "recompute" not in name:  # what is recomputed is sent again in any case
            assert once <= lent[0], "weights that are kept were sent again"
            # What the slots still hold is not sent again.
            assert 1.5 * lent[0] <= twice <= 2 * lent[0]


def count_weights_sent(run: dict[str, Any], step: int) -> int:
    """Return how many just-in-time clones got weights in a step; its bytes are theirs, and those of one gradient for each."""
    figures, sent = run["clones"]["said"][step], run["clones"]["sent"][step]
    assert figures["MB just in time"] * 1e6 == pytest.approx(EXPERT * (sent + figures["clones just in time"]))
    return int(sent)


def test_the_log_says_what_is_kept(lent_runs: Runs) -> None:
    log = (lent_runs["four ranks, two clones, kept"]["logs"] / "0" / "stdout.log").read_text()
    # Two clones in each of three layers, which are on one rank without a pipeline.
    kept = 3 * 2 * EXPERT
    assert f"each micro-batch under way keeps up to {kept:,} bytes of weights until its backward\n" in log


def test_a_recomputed_forward_has_the_plan_of_the_first_and_counts_once(lent_runs: Runs) -> None:
    run = lent_runs["1f1b, full recompute"]
    training = STEPS * MICROBATCHES * LAYERS
    evaluated = run["clones"]["loans"] - 2 * training
    assert run["clones"]["plans"] == training + evaluated, "a recomputed forward was planned again"
    counts = read_record(run["directory"] / "record").counts
    # A sample of 32 tokens on each of two expert-parallel ranks, two experts a token.
    assert set(counts.sum(2).flatten().tolist()) == {32 * 2 * 2}


def test_plans_from_a_micro_batchs_own_counts_balance_it(lent_runs: Runs) -> None:
    run = lent_runs["planned"]
    assert_same_steps(run, lent_runs["megatron, plain"])
    assert run["clones"]["wrong"] == 0
    for step in run["clones"]["said"]:
        assert step["balancedness before"] < 0.95 < 0.97 < step["balancedness"], f"the plan did not balance: {step}"


def test_auto_has_clones_of_both_kinds_where_they_pay(lent_runs: Runs) -> None:
    run = lent_runs["planned, auto"]
    assert_same_steps(run, lent_runs["megatron, plain"])
    # The first step knows no loads of the past: it has just-in-time clones alone.
    said = run["clones"]["said"]
    assert sum(step["clones"] for step in said) > 0 and sum(step["clones just in time"] for step in said) > 0
    assert min(step["balancedness"] for step in said) > 0.97


def test_to_measure_what_a_balanced_router_would_take_changes_no_bit(lent_runs: Runs) -> None:
    run, plain = lent_runs["planned, auto, measured"], lent_runs["planned, auto"]
    assert_same_steps(run, plain, 0)
    assert run["evaluations"] == plain["evaluations"]
    said = run["clones"]["said"]
    assert [number for number, step in enumerate(said, 1) if "share of force-balanced" in step] == [3, 6]
    assert all(0.2 < step["share of force-balanced"] < 5 for step in said[2::3]), "one of the two passes ran otherwise"
    same = ("balancedness", "clones", "clones just in time", "MB", "MB just in time")
    assert [[one[name] for name in same] for one in said] == [[one[name] for name in same] for one in plain["clones"]["said"]]
    record = read_record(run["directory"] / "measured")
    assert (record.figures["forced_ms"] > 0).tolist() == [step % MEASURED == 0 for step in range(1, STEPS + 1)]
    assert "| force-balanced, forward: " in (run["logs"] / "3" / "stdout.log").read_text()


def test_auto_has_no_just_in_time_clones_where_they_do_not_pay(lent_runs: Runs) -> None:
    run = lent_runs["planned, auto, large experts"]
    assert run["clones"]["loans"] > 0, "nothing was planned"
    for step in run["clones"]["said"]:
        assert step["clones just in time"] == 0


def test_the_log_says_what_shared_slots_take(lent_runs: Runs) -> None:
    log = (lent_runs["interleaved, two clones"]["logs"] / "0" / "stdout.log").read_text()
    # An expert has a gate, an up and a down projection of 32 x 16, in fp32; gradients have memory twice.
    size = 2 * 3 * 32 * 16 * 4
    assert (
        f"counterflow: eplb: 2 clones per rank in slots that its MoE layers share: {size:,} bytes of weights and {2 * size:,} "
        f"bytes of gradients, whatever the number of layers; in slots of each layer {2 * size:,} and {2 * size:,}\n"
    ) in log


@pytest.mark.parametrize("method", KILLS)
def test_a_rank_killed_in_a_transfer_ends_all_with_a_report_and_the_last_checkpoint_resumes(
    lent_runs: Runs, text: Path, tmp_path: Path, method: str
) -> None:
    base = [*list_base_flags(text, tmp_path), *TWO_STAGES, *lend("exact", 2), *SCHEDULES["1f1b"], "--train-iters", str(STEPS)]
    reference = lent_runs["megatron, plain"]
    # It saves in the folder from which the run behind it goes on.
    start, save = start_from(reference["directory"] / "initial"), save_to(tmp_path / "saved", KILLED - 1)
    kill = {"rank": 2, "method": method, "step": KILLED}
    case = {"name": "killed", "plugin": True, "flags": [*base, *start, *save], "kill": kill}
    job = {"case": case, "results": str(tmp_path / "none.json")}
    statuses = fork_ranks("eplb_worker", job, RANKS, tmp_path / "killed", alone=True, timeout=120)
    for index, status in enumerate(statuses):
        said = (tmp_path / "killed" / str(index) / "stderr.log").read_text()[-3000:]
        assert status is not None, f"rank {index} waits for ever"
        assert status == -signal.SIGKILL if index == 2 else status > 0, f"rank {index}: {status}, {said}"
    assert "PipelineError: rank 1 (global rank 3) was in " in said, "the killed rank's peer has no report"
    resumed = {"name": "resumed", "plugin": True, "flags": [*base, "--load", str(tmp_path / "saved")], "seed": 7}
    run = run_case("eplb_worker", resumed, tmp_path)
    assert [step["iteration"] for step in run["steps"]] == list(range(KILLED, STEPS + 1))
    assert_same_steps(run, reference)
    assert run["clones"]["computed"] and not run["clones"]["wrong"]
