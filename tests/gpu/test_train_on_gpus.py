"""The example's model on GPUs, over NCCL: schedules, pairs on CUDA streams, clones, records, beside plain Megatron's run."""

import pytest

from counterflow.analysis import analyze_trace, read_traces
from counterflow.schedule import load_record
from counterflow.schedule.sharing import find_sharing
from tests.gpu.gpu_cases import BALANCED, FAMILIES, LENT, PAIRS, STEPS
from tests.support.comparing import TOLERANCE, assert_same_steps, find_difference
from tests.support.run_cases import Runs

# Kernels add some gradients in an order of their own, in half precision itself.
HALF = 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schedule_leaves_losses_and_norms_as_they_are(gpu_runs: Runs, family: str) -> None:
    assert_same_steps(gpu_runs[family], gpu_runs["plain"], TOLERANCE)


def test_in_half_precision(gpu_runs: Runs) -> None:
    assert_same_steps(gpu_runs["bf16, dualpipev"], gpu_runs["bf16, plain"], HALF)


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_the_same_numbers_as_without_and_are_recorded(gpu_runs: Runs, kind: str) -> None:
    """CUDA events give turns, waits and completions of transfers."""
    run = gpu_runs[kind]
    assert_same_steps(run, gpu_runs[f"{kind}, apart"], HALF if "bf16" in kind else TOLERANCE)
    timeline = load_record(run["directory"] / kind, step=STEPS)
    assert all(span.end > span.start for span in timeline.spans)
    assert 0 < timeline.bubble < 1
    pairs = [span for span in timeline.spans if span.action.parts]
    assert timeline.communications and len(timeline.turns) == len(pairs)
    assert all(one.complete is not None for one in timeline.communications)
    found = [sharing for sharing in find_sharing(timeline) if sharing.span.action.parts]
    assert all(part.computes for sharing in found for part in sharing.parts), "a part never had the rank"


@pytest.mark.parametrize("kind", BALANCED)
def test_clones_leave_losses_and_norms_as_they_are(gpu_runs: Runs, kind: str) -> None:
    run = gpu_runs[kind]
    assert_same_steps(run, gpu_runs["plain"], TOLERANCE)
    clones = run["clones"]
    assert clones["tokens"] > 0, "no clone had a token"
    assert clones["wrong"] == 0, "clones have the bits of their homes"


@pytest.mark.parametrize("kind", LENT)
def test_clones_for_one_micro_batch_leave_losses_and_norms_as_they_are(gpu_runs: Runs, kind: str) -> None:
    run = gpu_runs[kind]
    assert_same_steps(run, gpu_runs["plain"], TOLERANCE)
    clones = run["clones"]
    assert clones["different_loans"] > STEPS, "hardly any micro-batch had other clones than the one before"
    assert clones["computed"] > STEPS and clones["backwards"] > STEPS, "hardly any clone computed"
    assert clones["wrong"] == 0, "clones have the bits of their homes"


def test_a_hybrid_model_with_pairs(gpu_runs: Runs) -> None:
    assert_same_steps(gpu_runs["hybrid, pairs"], gpu_runs["hybrid, plain"], TOLERANCE)


def test_a_profile_is_analyzed(gpu_runs: Runs) -> None:
    run = gpu_runs["profile"]
    assert find_difference(run, gpu_runs["plain"]) <= TOLERANCE
    devices = [device for trace in read_traces(run["directory"] / "profile") for device in analyze_trace(trace)]
    assert len(devices) == 4, "one of each rank"
    for device in devices:
        assert sum(phase.compute for phase in device.phases) > 0, "kernels are in the actions that launched them"


def test_a_loss_that_is_no_number_ends_all_ranks(gpu_runs: Runs) -> None:
    assert "NaN" in gpu_runs["not a number"]["error"]
