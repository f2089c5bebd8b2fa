"""The training cases of this folder; each runs when a test first asks for it."""

from pathlib import Path

import pytest

import eplb_cases
import hybrid_cases
import te_cases
from cases import list_cases
from counterflow.schedule import build, to_csv
from data import prepare_text
from tests.support.run_cases import Runs


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real text."""
    return prepare_text(tmp_path_factory.mktemp("text"), max_bytes=2**21)


@pytest.fixture(scope="session")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each training case logged, by its name."""
    directory = tmp_path_factory.mktemp("training")
    # A table as a user would write it to a file; 2 pipeline ranks, 6 micro-batches.
    (directory / "table.csv").write_text(to_csv(build("dualpipev", 2, 6)))
    return Runs("worker", list_cases(text, directory), directory)


@pytest.fixture(scope="session")
def balanced_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each balancing case logged, by its name."""
    directory = tmp_path_factory.mktemp("balancing")
    return Runs("eplb_worker", eplb_cases.list_cases(text, directory), directory)


@pytest.fixture(scope="session")
def hybrid_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each case of HybridModel logged, by its name."""
    directory = tmp_path_factory.mktemp("hybrid")
    return Runs("eplb_worker", hybrid_cases.list_cases(text, directory), directory)


@pytest.fixture(scope="session")
def te_runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each case of Transformer Engine logged, by its name."""
    directory = tmp_path_factory.mktemp("engine")
    return Runs("te_worker", te_cases.list_cases(text, directory), directory)
