"""A loop over megatron-core without its trainer trains under a schedule with clones, or says what it lacks."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.asked import mark_nightly
from tests.support.comparing import assert_same_steps
from tests.support.run_cases import Runs

STEPS = 4
# The seed, and the flags beside the loop's own options.
RUNS = {
    "dualpipev": (1, []),
    "dualpipev, another seed": (2, []),
    "dualpipe": (1, ["--cf-schedule", "dualpipe"]),
    "overlapped pairs": (1, ["--cf-overlap"]),
    "1f1b": (1, ["--cf-schedule", "1f1b", "--chunks", "1"]),
}
WRONG = {
    "chunks not laid out": ([], "build each chunk of a rank by counterflow.lay_out_chunks"),
    "groups of its own": ([], "let it take them by a keyword pg_collection, and give it that"),
    "partner's samples not read": (["--cf-schedule", "dualpipe"], "samples of data-parallel rank counterflow.find_data_rank(1)"),
    "schedule taken too early": (["--no-cf-eplb"], "get_forward_backward_func() after counterflow.enable(), not before"),
    "one chunk": (["--chunks", "1"], "holds 2 model chunks per pipeline rank (VPP 2), 1 chunks per rank given"),
    "homes that move": (["--cf-eplb-rehome-interval", "2"], "which takes megatron.training: drop it in a loop of your own"),
}


def list_cases(directory: Path) -> list[dict[str, Any]]:
    cases, starts = [], {}
    for seed in (1, 2):
        weights = str(directory / f"weights {seed}")
        starts[seed] = ["--seed", str(seed), "--steps", str(STEPS), "--load", weights]
        cases.append({"name": f"weights {seed}", "flags": ["--plain", "--seed", str(seed), "--steps", "0", "--save", weights]})
        cases.append({"name": f"plain {seed}", "flags": ["--plain", *starts[seed]]})
    cases += [{"name": name, "flags": [*starts[seed], *flags]} for name, (seed, flags) in RUNS.items()]
    cases += [{"name": name, "flags": ["--steps", "1", *flags], "wrong": name} for name, (flags, _) in WRONG.items()]
    return cases


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("loop")
    return Runs("loop_worker", list_cases(directory), directory)


@pytest.mark.parametrize("name", mark_nightly(RUNS, lambda name: name not in ("dualpipev, another seed", "1f1b")))
def test_a_loop_without_megatrons_trainer_trains_alike(loops: Runs, name: str) -> None:
    assert len(loops[name]["steps"]) == STEPS
    assert_same_steps(loops[name], loops[f"plain {RUNS[name][0]}"])


@pytest.mark.parametrize("name", WRONG)
def test_what_a_loop_lacks_is_said(loops: Runs, name: str) -> None:
    error = loops[name]["error"]
    assert error is not None and WRONG[name][1] in error, f"{name}: {error}"
    assert not loops[name]["steps"], "it trained on another schedule than the one in force"
