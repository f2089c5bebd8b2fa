"""Whether two trainings are the same."""

import math
from typing import Any

import pytest

# Only the order in which fp32 gradients are summed differs, under half precision too.
TOLERANCE = 1e-5
# Where the order differs in which a token's experts are summed, in half precision itself.
HALF_TOLERANCE = 1e-3


def assert_same_steps(run: dict[str, Any], reference: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Losses and gradient norms agree at each step that both logged, and the same steps were skipped."""
    expected = {step["iteration"]: step for step in reference["steps"]}
    assert run["error"] is None
    assert run["steps"], f"{run['name']} logged no step"
    for step in run["steps"]:
        other = expected[step["iteration"]]
        assert step["skipped"] == other["skipped"]
        for name in ("loss", "grad_norm"):
            assert math.isfinite(step[name]) or step["skipped"], (
                f"{run['name']}: {name} of step {step['iteration']} is {step[name]}"
            )
            assert step[name] == pytest.approx(other[name], rel=tolerance, nan_ok=True), (
                f"{run['name']}, step {step['iteration']}: {name} {step[name]} is not {other[name]} of {reference['name']}"
            )
