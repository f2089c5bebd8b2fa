"""Real training runs under each schedule against plain Megatron, from one checkpoint."""

import json
from itertools import product
from statistics import median

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cases import FAMILIES, GROWN, OWN_REFERENCE, PAIRS, PROFILED, RESUMED, SAVED, SCHEDULES, SEARCHED, STEPS, VARIANTS
from counterflow.schedule import load_record
from counterflow.schedule.timeline import find_last_step
from tests.support.asked import mark_nightly
from tests.support.comparing import TOLERANCE, assert_same_steps
from tests.support.profiled import check_layers
from tests.support.run_cases import Runs


@pytest.mark.parametrize("optimizer", ["plain", "sharded"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_trains_like_megatron(runs: Runs, schedule: str, optimizer: str) -> None:
    run = runs[f"{schedule}, {optimizer}"]
    assert len(run["steps"]) == STEPS
    assert_same_steps(run, runs[f"megatron 1f1b, {optimizer}"])


@pytest.mark.parametrize("optimizer", ["plain", "sharded"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluation_agrees(runs: Runs, schedule: str, optimizer: str) -> None:
    expected = runs[f"megatron 1f1b, {optimizer}"]["evaluations"]
    assert len(expected) == 4, "steps 5 and 10, and the validation and test sets at the end"
    assert runs[f"{schedule}, {optimizer}"]["evaluations"] == pytest.approx(expected, rel=TOLERANCE)


def test_the_losses_depend_on_the_weights_at_all(runs: Runs) -> None:
    losses = [step["loss"] for step in runs["megatron 1f1b, plain"]["steps"]]
    assert losses[-1] < losses[0] - 0.5, "a model that does not learn would agree under any schedule"


def test_without_a_flag_every_bit_is_megatrons(runs: Runs) -> None:
    assert runs["no flag"]["steps"] == runs["megatron 1f1b, sharded"]["steps"]
    assert runs["no flag"]["evaluations"] == runs["megatron 1f1b, sharded"]["evaluations"]


def test_a_table_from_a_file_trains_alike(runs: Runs) -> None:
    assert_same_steps(runs["table.csv"], runs["megatron 1f1b, plain"])


@pytest.mark.parametrize("name", mark_nightly([*FAMILIES, *SEARCHED], lambda name: name in ("zb-h1", "zbv", "searched V")))
def test_other_families_and_searched_tables_train_alike(runs: Runs, name: str) -> None:
    assert_same_steps(runs[name], runs["megatron 1f1b, plain"])


def test_auto_trains_alike_before_and_after_it_changes_tables(runs: Runs) -> None:
    run, reference = runs["auto"], runs["megatron 1f1b, sharded"]
    assert len(run["steps"]) == STEPS
    assert_same_steps(run, reference)
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=TOLERANCE)
    records = sorted((run["directory"] / "record, auto").glob("timeline-rank*.jsonl"))
    tables = [[json.loads(line)["schedule"] for line in record.read_text().splitlines()] for record in records]
    assert tables == [["zbv"] * 6 + ["auto"] * 4] * 4, "three steps are measured, three search, on all ranks"


# Each schedule saves and loads in every run.
CHAIN = {("1f1b", "interleaved"), ("interleaved", "dualpipev"), ("dualpipev", "1f1b")}


@pytest.mark.parametrize(("saved", "loaded"), mark_nightly(product(SCHEDULES, SCHEDULES), CHAIN.__contains__))
def test_resume_under_another_schedule_is_exact(runs: Runs, saved: str, loaded: str) -> None:
    run = runs[f"{saved}, sharded -> {loaded}"]
    assert [step["iteration"] for step in run["steps"]] == list(range(SAVED + 1, RESUMED + 1))
    assert_same_steps(run, runs["megatron 1f1b, sharded"])


@pytest.mark.parametrize(("saved", "loaded"), [("dualpipev", "1f1b"), ("1f1b", "dualpipev")])
def test_resume_without_the_distributed_optimizer(runs: Runs, saved: str, loaded: str) -> None:
    assert_same_steps(runs[f"{saved}, plain -> {loaded}"], runs["megatron 1f1b, plain"])


def test_cross_linked_replicas_train_like_megatron(runs: Runs) -> None:
    # A loss against the labels of the rank's own replica, not the partner's, is far off from the first step on.
    assert len(runs["dualpipe, sharded"]["steps"]) == STEPS
    assert_same_steps(runs["dualpipe, sharded"], runs["megatron 1f1b, sharded"])
    expected = runs["megatron 1f1b, sharded"]["evaluations"]
    assert runs["dualpipe, sharded"]["evaluations"] == pytest.approx(expected, rel=TOLERANCE)


def test_cross_linked_replicas_reduce_early_and_count_the_partners_tokens(runs: Runs) -> None:
    assert_same_steps(runs["dualpipe, overlap, per-token loss"], runs["megatron 1f1b, plain"])


@pytest.mark.parametrize(("saved", "loaded"), [("dualpipe", "1f1b"), ("dualpipev", "dualpipe")])
def test_cross_linked_replicas_share_checkpoints_with_others(runs: Runs, saved: str, loaded: str) -> None:
    run = runs[f"{saved}, sharded -> {loaded}"]
    assert [step["iteration"] for step in run["steps"]] == list(range(SAVED + 1, RESUMED + 1))
    assert_same_steps(run, runs["megatron 1f1b, sharded"])


@pytest.mark.parametrize("variant", mark_nightly(VARIANTS, lambda name: name not in ("overlap", "bf16")))
def test_dualpipev_with(runs: Runs, variant: str) -> None:
    reference = runs[f"megatron 1f1b, {OWN_REFERENCE.get(variant, 'plain')}"]
    assert_same_steps(runs[f"dualpipev, {variant}"], reference)


def test_overlapped_pairs_train_and_evaluate_as_without(runs: Runs) -> None:
    run, reference = runs["dualpipev, bf16, overlapped pairs"], runs["megatron 1f1b, bf16"]
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=TOLERANCE)
    assert_same_steps(runs["interleaved, overlapped pairs"], reference)


@pytest.mark.parametrize("name", PAIRS)
def test_overlapped_pairs_train_what_megatrons_own_refuse(runs: Runs, name: str) -> None:
    assert_same_steps(runs[f"dualpipev, {name}"], runs["megatron 1f1b, plain"])


def test_overlapped_pairs_change_no_bit(runs: Runs) -> None:
    assert runs["dualpipev, overlapped pairs"]["steps"] == runs["dualpipev, plain"]["steps"][:3]
    assert_same_steps(runs["dualpipe, overlapped pairs"], runs["megatron 1f1b, sharded"])


def test_micro_batches_of_several_lengths(runs: Runs) -> None:
    reference = runs["megatron 1f1b, varying lengths"]
    assert reference["steps"][0]["loss"] != runs["megatron 1f1b, plain"]["steps"][0]["loss"], "nothing was cut"
    assert_same_steps(runs["dualpipev, varying lengths"], reference)


def test_interleaved_with_overlap(runs: Runs) -> None:
    assert_same_steps(runs["interleaved, overlap"], runs["megatron 1f1b, plain"])


@pytest.mark.parametrize("schedule", mark_nightly(SCHEDULES, lambda schedule: schedule == "dualpipev"))
def test_four_pipeline_ranks_and_another_seed(runs: Runs, schedule: str) -> None:
    assert_same_steps(runs[f"{schedule}, four stages"], runs["megatron 1f1b, four stages"])


def test_tied_embeddings(runs: Runs) -> None:
    assert_same_steps(runs["dualpipev, tied"], runs["megatron 1f1b, tied"])
    untied = [step["loss"] for step in runs["megatron 1f1b, plain"]["steps"]]
    assert runs["dualpipev, tied"]["steps"][1]["loss"] != pytest.approx(untied[1], rel=1e-3), "the embeddings were not tied"


@pytest.mark.parametrize(
    ("name", "steps"), [("megatron 1f1b, tied -> dualpipev", [3, 4]), ("megatron 1f1b, tied -> dualpipev -> 1f1b", [4])]
)
def test_tied_embeddings_resume_under_another_schedule(runs: Runs, name: str, steps: list[int]) -> None:
    assert [step["iteration"] for step in runs[name]["steps"]] == steps
    assert_same_steps(runs[name], runs["megatron 1f1b, tied"])


def test_megatrons_own_overlapped_pairs_run_on_the_cpu_platform(runs: Runs) -> None:
    assert_same_steps(runs["megatron's own pairs, MTP, bf16"], runs["megatron 1f1b, MTP, bf16"])


def test_multi_token_prediction_on_an_uneven_layout(runs: Runs) -> None:
    run, reference = runs["dualpipev, MTP, uneven layout"], runs["megatron 1f1b, MTP"]
    assert_same_steps(run, reference)
    logged = [step["mtp_loss"] for step in run["steps"]]
    assert logged == pytest.approx([step["mtp_loss"] for step in reference["steps"]], rel=TOLERANCE), (
        "the last rank logs other losses of the predicted token than Megatron"
    )


def test_multi_token_prediction_in_half_precision(runs: Runs) -> None:
    assert_same_steps(runs["dualpipev, MTP, bf16"], runs["megatron 1f1b, MTP, bf16"])


@pytest.mark.parametrize("saved", mark_nightly(["megatron 1f1b", "dualpipev"], lambda saved: saved == "dualpipev"))
def test_multi_token_prediction_resumes_with_ranks_that_read_for_each_other(runs: Runs, saved: str) -> None:
    run = runs[f"{saved}, MTP, bf16 -> dualpipe"]
    assert [step["iteration"] for step in run["steps"]] == [3, 4]
    assert_same_steps(run, runs["megatron 1f1b, MTP, bf16"])


def test_no_two_parameters_or_states_of_an_optimizer_share_memory(runs: Runs) -> None:
    assert {name: run["sharing"] for name, run in runs.items() if run["sharing"]} == {}


def test_tensor_and_sequence_parallel(runs: Runs) -> None:
    assert_same_steps(runs["dualpipev, TP 2"], runs["megatron 1f1b, plain"])


def test_layout_bound_optimizer_state_is_refused_under_another_layout(runs: Runs) -> None:
    error = runs["fitted -> interleaved"]["error"]
    assert error is not None
    assert "OptionError" in error
    assert "--dist-ckpt-optim-fully-reshardable" in error


def test_nan_ends_all_ranks_in_a_clear_error_and_the_last_checkpoint_is_whole(runs: Runs) -> None:
    run = runs["NaN"]
    assert run["error"] is not None and "found NaN" in run["error"]
    saved = run["directory"] / "NaN"
    step = int((saved / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 1 and (saved / f"iter_{step:07d}" / "metadata.json").exists()


def test_optimizer_state_of_a_table_in_a_file_fits_the_layout_that_the_file_had(runs: Runs) -> None:
    assert runs["table.csv, fitted"]["error"] is None
    error = runs["table.csv, fitted -> overwritten"]["error"]
    assert error is not None and "saved under layout 'v 2' in a form that only fits that layout; this run has 'looped 2'" in error
    run = runs["table.csv, fitted -> dualpipev"]
    assert [step["iteration"] for step in run["steps"]] == [3]
    assert_same_steps(run, runs["megatron 1f1b, bf16"])


GROWN_EVERY_TIME = {("1234", "dualpipev"), ("1234", "dualpipe"), ("99", "interleaved")}


@pytest.mark.parametrize(
    ("seed", "schedule"),
    mark_nightly(((seed, schedule) for seed in GROWN for schedule in GROWN[seed]), GROWN_EVERY_TIME.__contains__),
)
def test_batches_that_grow_and_iterations_that_are_skipped(runs: Runs, seed: str, schedule: str) -> None:
    run, reference = runs[f"{schedule}, growing, {seed}"], runs[f"megatron 1f1b, growing, {seed}"]
    assert [step["iteration"] for step in run["steps"]] == [1, 3, 4, 6]
    assert_same_steps(run, reference)
    assert run["evaluations"] == pytest.approx(reference["evaluations"], rel=TOLERANCE)
    # Steps have Megatron's numbers, and as many micro-batches as their batch: both replicas' where they are cross-linked.
    replicas = 2 if schedule == "dualpipe" else 1
    for step, microbatches in ((1, 4), (3, 6), (6, 6)):
        spans = load_record(run["directory"] / f"record, growing, {seed}, {schedule}", step).spans
        found = {single.microbatch for span in spans for single in span.action.singles()}
        assert found == set(range(replicas * microbatches))


def test_a_record_goes_on_with_the_trainers_numbers_after_a_resume(runs: Runs) -> None:
    assert_same_steps(runs["recorded, resumed"], runs["megatron 1f1b, plain"])
    directory = runs["recorded"]["directory"] / "record"
    for path in directory.glob("timeline-rank*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 4], "steps 1 to 3, then 3 and 4 from the checkpoint of step 2"
        last = next(line for line in reversed(lines) if line["step"] == 3)
        rank, pipeline = last["rank"], last["pipeline"]
        spans = [span for span in load_record(directory, 3, pipeline).spans if span.rank == rank]
        assert [span.start for span in spans] == [start for _, start, _ in last["spans"]], "not the step of the resumed run"
    assert find_last_step(directory) == 4


def test_megatron_logs_the_memory_that_a_rank_holds(runs: Runs) -> None:
    log = EventAccumulator(str(runs["recorded"]["directory"] / "tensorboard")).Reload()
    now, peak = ([event.value for event in log.Scalars(name)] for name in ("mem-allocated-bytes", "mem-max-allocated-bytes"))
    assert len(now) == len(peak) == 3
    assert all(2**26 < held <= most for held, most in zip(now, peak, strict=True))
    assert_same_steps(runs["recorded"], runs["megatron 1f1b, plain"])


def test_recorded_timeline_has_every_action_once(runs: Runs) -> None:
    timeline = load_record(runs["recorded"]["directory"] / "record", step=2)
    kinds = [single.kind for span in timeline.spans for single in span.action.singles()]
    # Two ranks of two stages, six micro-batches.
    assert kinds.count("F") == 2 * 2 * 6
    assert kinds.count("B") + kinds.count("I") == 2 * 2 * 6
    assert kinds.count("W") == kinds.count("I") > 0
    lengths = {kind: median(s.end - s.start for s in timeline.spans if s.action.kind == kind) for kind in "IW"}
    # The matrices are tiny here; a W without work takes a hundredth of this.
    assert lengths["W"] > 0.02 * lengths["I"], f"a W does no work: {lengths}"
    assert 0 < timeline.bubble < 1


@pytest.mark.parametrize("name", PROFILED)
def test_a_profiled_step_has_the_time_of_each_layer(runs: Runs, name: str) -> None:
    check_layers(runs[f"dualpipev, {name}"]["directory"] / f"profile, {name}", [str(number) for number in range(1, 5)])
