"""Shared by all tests: where things are, and commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import ROOT

SHARED_DATA = ROOT.parent / "shared" / "data"

# The machine's pace is not under test; the same examples on every run.
settings.register_profile("counterflow", deadline=None, derandomize=True)
# Other examples every time, for `make nightly`.
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile("counterflow")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recordings beside the repository; tests that want it skip where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``counterflow`` on a line, and on words and paths after it; it has to end well. Returns what it printed."""
    from tests.support.running import run_command

    def run(line: str, *more: object) -> str:
        code, out, err = run_command([*line.split(), *map(str, more)], capsys)
        assert (code, err) == (0, "")
        return out

    return run
