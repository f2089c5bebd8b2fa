"""How far two trainings are apart, and whether they are the same."""

import math
from collections.abc import Iterator
from typing import Any

# Only the order in which fp32 gradients are summed differs, under half precision too.
TOLERANCE = 1e-5
# Where the order differs in which a token's experts are summed, in half precision itself.
HALF_TOLERANCE = 1e-3

Run = dict[str, Any]


def list_differences(run: Run, reference: Run, *names: str) -> Iterator[tuple[int, str, float]]:
    """Yield, for each step that ``run`` logged and each number of it, the step, the name and the relative difference.

    The names default to loss and gradient norm. A number that is not finite, or that only one of the two has, is infinitely far
    off; in a step that both skipped, no number counts.
    """
    expected = {step["iteration"]: step for step in reference["steps"]}
    for step in run["steps"]:
        other = expected.get(step["iteration"], {})
        for name in names or ("loss", "grad_norm"):
            yield step["iteration"], name, _find_difference(step, other, name)


def _find_difference(step: dict[str, Any], other: dict[str, Any], name: str) -> float:
    mine, theirs = step.get(name), other.get(name)
    if step.get("skipped") != other.get("skipped") or (mine is None) != (theirs is None):
        return math.inf
    if mine is None or theirs is None or mine == theirs or (step["skipped"] and math.isnan(mine) and math.isnan(theirs)):
        return 0.0
    return abs(mine - theirs) / abs(theirs) if math.isfinite(mine) and theirs else math.inf


def find_difference(run: Run, reference: Run, *names: str) -> float:
    """Return the largest relative difference of all steps; infinite where the two logged other steps, or none."""
    if [step["iteration"] for step in run["steps"]] != [step["iteration"] for step in reference["steps"]]:
        return math.inf
    return max((difference for _, _, difference in list_differences(run, reference, *names)), default=math.inf)


def assert_same_steps(run: Run, reference: Run, tolerance: float = TOLERANCE) -> None:
    """Losses and gradient norms agree at each step that ``run`` logged, and the same steps were skipped."""
    assert run["error"] is None
    assert run["steps"], f"{run['name']} logged no step"
    expected = {step["iteration"]: step for step in reference["steps"]}
    mine = {step["iteration"]: step for step in run["steps"]}
    for step, name, difference in list_differences(run, reference):
        assert difference <= tolerance, (
            f"{run['name']}, step {step}: {name} {mine[step][name]} (skipped: {mine[step]['skipped']}) is not that of "
            f"{reference['name']}: {expected.get(step)}"
        )
