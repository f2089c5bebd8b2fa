"""Clones in FP8 whose experts are modules of their own: they receive BF16, and quantize it again after every transfer.

Each linear of such a clone keeps an FP8 weight in its cache. Placements change at every step, so a cache that was not renewed
would be that of another expert.
"""

from pathlib import Path

import pytest

from eplb_cases import CLONES
from te_cases import STEPS, EngineCases, V, list_engine_flags
from tests.support.comparing import find_difference
from tests.support.run_cases import Run, Runs

GROUPED = ("--moe-grouped-gemm",)
# Relative, on norms: an expert's gradients are rounded to BF16 in parts.
ROUNDING = 1e-4
# Bytes of BF16 for an expert's weights, beside its gradients in FP32.
WEIGHTS, GRADIENTS = 2 * 3 * 64 * 64, 4 * 3 * 64 * 64


@pytest.fixture(scope="module")
def single_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("single_experts")
    cases = EngineCases(directory, list_engine_flags(text, directory), STEPS)
    cases.begin("initial", without=GROUPED)
    cases.refer("plain", recipe="blockwise", without=GROUPED)
    cases.train("clones", V, CLONES[2], recipe="blockwise", without=GROUPED)
    return Runs("te_worker", list(cases), directory)


def test_a_clone_computes_with_the_weights_it_received_last(single_runs: Runs) -> None:
    run, reference = single_runs["clones"], single_runs["plain"]
    assert run["clones"]["computed"] and run["clones"]["changes"]
    assert not run["clones"]["wrong"]
    assert find_difference(run, reference, "loss") == 0.0
    assert find_difference(run, reference, "grad_norm") <= ROUNDING
    assert sum_weights(run) > sum_weights(reference), "weights of clones are quantized too"


def test_weights_travel_in_bf16(single_runs: Runs) -> None:
    # Nothing is cloned in the first step.
    for figures in single_runs["clones"]["clones"]["said"][1:]:
        assert figures["MB"] * 1e6 / figures["clones"] == pytest.approx(WEIGHTS + GRADIENTS, abs=0.1)


def sum_weights(run: Run) -> int:
    return sum(work["weights"] for work in run["work"])
