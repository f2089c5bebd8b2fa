"""Shared by all tests: where things are."""

from pathlib import Path

import pytest
from hypothesis import settings

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

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
