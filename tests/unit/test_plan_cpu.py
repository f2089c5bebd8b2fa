"""The benchmark on stages that sleep: its calibration finds in one layout's run what other layouts then take."""

from typing import Any

import pytest

from benchmarks.plan_cpu import CALIBRATION, OTHERS, Unit, calibrate, find_step, make_plan
from counterflow.planner.layouts import Plan, build_table
from counterflow.schedule import simulate

TRUTH = Unit((0.010, 0.013, 0.007), (0.0004, 0.0003, 0.0005), (0.015, 0.0195, 0.0105), (0.0009, 0.0008, 0.0002), 0.0004)
GAPS = dict(zip("FIW", TRUTH.gap, strict=True)) | {"B": TRUTH.gap[1] + TRUTH.gap[2]}


def run(plan: Plan) -> list[dict[str, Any]]:
    """Return what ranks would measure whose actions take what `TRUTH` says: a rank's own time before an action is no span."""
    timeline = simulate(build_table(plan.layout, plan.microbatches), TRUTH.cost(plan))
    rows: list[dict[str, Any]] = [{"begin": 0.0, "end": timeline.makespan, "actions": []} for _ in range(plan.layout.pp)]
    for span in timeline.spans:
        rows[span.rank]["actions"].append([str(span.action), span.start + GAPS[span.action.kind], span.end])
    return rows


@pytest.mark.parametrize("layout", [layout for _, layout in OTHERS], ids=[name for name, _ in OTHERS])
def test_time_of_an_action_that_does_not_shrink_with_its_chunk_is_found_in_another_layout(layout: dict[str, Any]) -> None:
    unit = calibrate(make_plan(CALIBRATION[1]), run(make_plan(CALIBRATION[1])))
    assert unit.layer == pytest.approx(TRUTH.layer, rel=1e-3) and unit.gap == pytest.approx(TRUTH.gap, rel=1e-3)
    plan = make_plan(layout)
    assert unit.predict(plan) == pytest.approx(find_step(run(plan)), rel=1e-3)
