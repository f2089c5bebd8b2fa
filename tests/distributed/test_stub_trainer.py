"""A second trainer: plain torch modules under DualPipeV with cloned experts, by the options that Megatron takes."""

import json
import sys
from typing import Any

import pytest

from ranks import start_ranks
from tests.support import ROOT
from tests.support.running import load_module

FOLDER = ROOT / "examples" / "stub_trainer"
STEPS, SEEDS = 6, (11, 1234)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("stub")
    out = directory / "out.json"
    command = [sys.executable, "-W", "ignore", str(FOLDER / "adapter.py"), str(out), str(STEPS), *map(str, SEEDS)]
    start_ranks(4, command, directory)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_are_those_without_schedule_and_clones(trained: dict[str, Any], seed: int) -> None:
    expected = load_module(FOLDER / "trainer.py").train_plain(seed, STEPS)
    assert trained[str(seed)]["losses"] == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0] - 0.1, "the model learns nothing: equal losses say nothing"


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_are_cloned_and_ranks_are_better_balanced(trained: dict[str, Any], seed: int) -> None:
    steps = trained[str(seed)]["clones"]
    assert steps[0]["clones"] == 0, "the first step has no loads to plan from"
    assert all(step["clones"] > 0 and step["MB"] > 0 for step in steps[1:])
    assert all(step["balancedness"] > step["balancedness before"] for step in steps[1:])


def test_megatron_is_not_needed(trained: dict[str, Any]) -> None:
    assert trained["megatron"] is False


def test_an_adapter_is_short() -> None:
    assert len((FOLDER / "adapter.py").read_text().splitlines()) <= 120
