"""Just-in-time clones of Transformer Engine's grouped experts: weight gradients are queued, those of biases computed at once.

In FP8 they are held to what is held of resident clones (`test_te.py`), which were measured there.
"""

from pathlib import Path

import pytest

from just_in_time_cases import lend
from te_cases import BIASED, FULL_RECOMPUTE, PAIRED, STEPS, EngineCases, V, list_engine_flags
from tests.support.asked import mark_nightly
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.run_cases import Runs
from tests.support.training import OVERLAPPED, SCHEDULES, drop_flags

# Under zb-h1 a stage has four layers with experts: the gradients of one are home before the W of its micro-batch ends. The W of a
# step's first micro-batch overwrites gradients.
DEEP = ["--num-layers", "8", "--moe-layer-freq", "([0]*1+[1]*7)"]


@pytest.fixture(scope="module")
def lent_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("lent_engine")
    flags = drop_flags(list_engine_flags(text, directory), *DEEP[::2])
    cases = EngineCases(directory, [*flags, *DEEP], STEPS)
    cases.begin("initial, biased", without=BIASED)
    cases.refer("biased", without=BIASED)
    cases.train("zb-h1", lend("exact", 2), ["--cf-schedule", "zb-h1"], without=BIASED)
    cases.train("dualpipev, pairs", lend("exact", 2), OVERLAPPED, PAIRED, without=BIASED)
    cases.train("dualpipev, auto", lend("auto"), OVERLAPPED, V, without=BIASED)
    return Runs("te_worker", list(cases), directory)


@pytest.mark.parametrize("name", ["zb-h1", "dualpipev, pairs", "dualpipev, auto"])
def test_queued_gradients_of_just_in_time_clones_come_home(lent_runs: Runs, name: str) -> None:
    run = lent_runs[name]
    assert find_difference(run, lent_runs["biased"], "loss", "grad_norm") <= TOLERANCE
    assert run["clones"]["computed"] and not run["clones"]["wrong"] and run["clones"]["backwards"]


# Relative bounds on losses and on norms, and the bytes in which an expert goes to a clone; its gradients are in FP32.
ROUNDING = {"tensorwise": (1e-3, 5e-3), "blockwise": (0.0, 1e-4), "mxfp8": (0.0, 1e-4)}
EXPERT = 3 * 64 * 64
ON_THE_WIRE = {"tensorwise": EXPERT + 2 * 4, "blockwise": EXPERT + 2 * 16, "mxfp8": 2 * EXPERT}
KEPT = ["--cf-eplb-backward", "keep"]
IN_FP8 = {
    "blockwise, pairs": ("blockwise", [lend("exact", 2), OVERLAPPED, PAIRED]),
    "blockwise, pairs, kept": ("blockwise", [lend("exact", 2, *KEPT), OVERLAPPED, PAIRED]),
    "blockwise, 1f1b, auto": ("blockwise", [lend("auto"), SCHEDULES["1f1b"]]),
    "blockwise, recomputed": ("blockwise, recomputed", [lend("exact", 2), FULL_RECOMPUTE, V]),
    "tensorwise, zbv": ("tensorwise", [lend("exact", 2), ["--cf-schedule", "zbv"]]),
    "tensorwise, zbv, kept": ("tensorwise", [lend("exact", 2, *KEPT), ["--cf-schedule", "zbv"]]),
    "mxfp8, dualpipev": ("mxfp8", [lend("exact", 2), V]),
    "mxfp8, pairs, kept": ("mxfp8", [lend("exact", 2, *KEPT), OVERLAPPED, PAIRED]),
}

LASTING = "blockwise, the same clones in every micro-batch"


@pytest.fixture(scope="module")
def fp8_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("lent_fp8")
    cases = EngineCases(directory, list_engine_flags(text, directory), STEPS)
    cases.begin("initial")
    for recipe in ROUNDING:
        cases.refer(recipe, recipe=recipe)
    cases.refer("blockwise, recomputed", FULL_RECOMPUTE, recipe="blockwise")
    for name, (_, flags) in IN_FP8.items():
        cases.train(name, *flags, recipe=name.split(",")[0])
    cases.train(LASTING, lend("exact", 2), SCHEDULES["1f1b"], recipe="blockwise", plans="lasting")
    return Runs("te_worker", list(cases), directory)


@pytest.mark.parametrize("name", mark_nightly(IN_FP8, lambda name: name == "blockwise, pairs"))
def test_just_in_time_clones_compute_in_fp8(fp8_runs: Runs, name: str) -> None:
    reference, recipe = IN_FP8[name][0], name.split(",")[0]
    run = fp8_runs[name]
    of_losses, of_norms = ROUNDING[recipe]
    assert find_difference(run, fp8_runs[reference], "loss") <= of_losses
    assert find_difference(run, fp8_runs[reference], "grad_norm") <= of_norms
    assert run["clones"]["computed"] and not run["clones"]["wrong"] and run["clones"]["backwards"]
    for figures, sent in zip(run["clones"]["said"], run["clones"]["sent"], strict=True):
        lent = figures["clones just in time"]
        size = figures["MB just in time"] * 1e6 - 4 * EXPERT * lent
        assert size == pytest.approx(ON_THE_WIRE[recipe] * sent, abs=0.1 * sent), "weights did not travel as they compute"
        # What the slots still hold is not sent again.
        assert 0 < sent <= (lent if "kept" in name else 2 * lent)
    if "kept" not in name and f"{name}, kept" in IN_FP8:
        kept = fp8_runs[f"{name}, kept"]
        assert find_difference(kept, run, "loss", "grad_norm") == 0, "weights that are kept are not those that are sent again"


def test_what_slots_hold_is_sent_again_behind_an_optimizer_step(fp8_runs: Runs) -> None:
    run = fp8_runs[LASTING]
    assert find_difference(run, fp8_runs["blockwise"], "loss") == 0
    assert run["clones"]["different_loans"] <= 4, "the slots did not hold what came next"
    assert run["clones"]["computed"] and not run["clones"]["wrong"], "a clone had weights of before the optimizer's step"


def test_the_log_says_what_shared_slots_take_in_fp8(fp8_runs: Runs) -> None:
    log = (fp8_runs["blockwise, pairs"]["logs"] / "0" / "stdout.log").read_text()
    # Two sets of two clones, as two layers of two: data and scales in both directions, and no weights in BF16.
    size = 2 * 2 * 2 * ON_THE_WIRE["blockwise"]
    assert f"2 clones per rank in slots that its MoE layers share: {size:,} bytes of weights and " in log
    assert f"; of the weights FP8 data and scales are {size:,}, in slots of each layer {size:,}\n" in log
