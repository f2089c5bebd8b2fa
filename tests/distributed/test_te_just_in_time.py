"""Just-in-time clones of Transformer Engine's grouped experts: weight gradients are queued, those of biases computed at once."""

from pathlib import Path

import pytest

from just_in_time_cases import lend
from te_cases import BIASED, PAIRED, STEPS, EngineCases, V, list_engine_flags
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.run_cases import Runs
from tests.support.training import OVERLAPPED


@pytest.fixture(scope="module")
def lent_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("lent_engine")
    cases = EngineCases(directory, list_engine_flags(text, directory), STEPS)
    cases.begin("initial, biased", without=BIASED)
    cases.refer("biased", without=BIASED)
    cases.train("zbv", lend("exact", 2), ["--cf-schedule", "zbv"], without=BIASED)
    cases.train("dualpipev, pairs", lend("exact", 2), OVERLAPPED, PAIRED, without=BIASED)
    cases.train("dualpipev, auto", lend("auto"), OVERLAPPED, V, without=BIASED)
    return Runs("te_worker", list(cases), directory)


@pytest.mark.parametrize("name", ["zbv", "dualpipev, pairs", "dualpipev, auto"])
def test_queued_gradients_of_just_in_time_clones_come_home(lent_runs: Runs, name: str) -> None:
    run = lent_runs[name]
    assert find_difference(run, lent_runs["biased"], "loss", "grad_norm") <= TOLERANCE
    assert run["clones"]["computed"] and not run["clones"]["wrong"] and run["clones"]["backwards"]
