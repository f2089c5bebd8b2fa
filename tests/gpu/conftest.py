"""What the trainings on GPUs logged; each runs when a test first asks for it. Skipped where no GPU is found."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import te_cases
from data import prepare_text
from tests.gpu import gpu_cases
from tests.support.gpus import count_gpus, make_runs
from tests.support.run_cases import Runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests where there is no GPU."""
    if count_gpus():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, which four ranks may share"))


@pytest.fixture(scope="session")
def gpu_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real text."""
    return prepare_text(tmp_path_factory.mktemp("text"), max_bytes=2**21)


@pytest.fixture(scope="session")
def gpu_runs(gpu_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each training of Megatron's local layers logged, by its name."""
    directory = tmp_path_factory.mktemp("local")
    return make_runs("eplb_worker", gpu_cases.list_cases(gpu_text, directory), directory)


@pytest.fixture(scope="session")
def engine_runs(gpu_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each training of Transformer Engine's layers, compiled for the GPU, logged."""
    if find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine, compiled")
    directory = tmp_path_factory.mktemp("engine")
    return make_runs("eplb_worker", te_cases.list_cases(gpu_text, directory), directory)
