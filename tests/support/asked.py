"""Which cases of a grid the tests that were chosen ask for, so that no other is trained."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def list_asked(request: pytest.FixtureRequest, argument: str = "case") -> set[Any]:
    """Return the values of a parameter in the tests that are to run and use the fixture."""
    tests: list[Any] = [item for item in request.session.items if item.path == request.path]
    used = [test for test in tests if request.fixturename in test.fixturenames and hasattr(test, "callspec")]
    return {test.callspec.params[argument] for test in used if argument in test.callspec.params}


def mark_nightly(cases: Iterable[Any], is_in_every_run: Callable[[Any], bool]) -> list[Any]:
    """Return cases, each a name or a tuple, as parameters of a test; what is not in every run is left to ``make nightly``."""
    return [case if is_in_every_run(case) else _leave_to_nightly(case) for case in cases]


def _leave_to_nightly(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)
