"""Which cases of a grid the tests that were chosen ask for, so that no other is trained."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def list_asked(request: pytest.FixtureRequest, argument: str = "case") -> set[Any]:
    """Return the values of a parameter in the tests that are to run and use the fixture."""
    tests: list[Any] = [item for item in request.session.items if item.path == request.path]
    used = [test for test in tests if request.fixturename in test.fixturenames and hasattr(test, "callspec")]
    return {test.callspec.params[argument] for test in used if argument in test.callspec.params}


def mark_nightly(names: Iterable[str], is_in_every_run: Callable[[str], bool]) -> list[Any]:
    """Return the names as parameters of a test; those that are not in every run are left to ``make nightly``."""
    return [name if is_in_every_run(name) else pytest.param(name, marks=pytest.mark.nightly) for name in names]
