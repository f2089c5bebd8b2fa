"""Measured costs of a model chunk in place of the model's own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.layouts import Plan
from counterflow.schedule import Costs
from counterflow.schedule.costs import spread_over
from counterflow.schedule.costs_file import CostsFile, read_costs


def read_measured(path: Path, plan: Plan) -> CostsFile:
    """Return the costs of a file, which has to have one number for each stage of the plan, or one for all of them."""
    try:
        measured = read_costs(path)
    except ScheduleError as error:
        raise PlanError(f"costs: {error}") from None
    for name in ("f", "i", "w", "reduce"):
        value = getattr(measured.costs, name)
        if isinstance(value, tuple | list) and len(value) != plan.layout.stages:
            raise PlanError(
                f"costs: {path} has {name} of {len(value)} stages, and the plan has {plan.layout.stages} (pp {plan.layout.pp} "
                f"x vpp {plan.layout.vpp}): these are costs of another model or layout; measure this one, or change pp and vpp"
            )
    return measured


# Costs that are further off than this are not of the plan: past errors of the model are below a half.
MOST_OFF = 4.0


def check_measured(measured: CostsFile, costs: Costs, name: str) -> None:
    """Raise `PlanError` for costs that are so far from the model's own that they are those of another model or machine."""
    # A number alone is that of each stage; the model's own costs are by stage.
    stages = len(costs.f) if isinstance(costs.f, Sequence) else 1
    whole, own = (_sum_up(one, stages) for one in (apply_measured(measured, costs), costs))
    if not own / MOST_OFF <= whole <= own * MOST_OFF:
        raise PlanError(
            f"costs: {name} says {whole:.3g} s for a micro-batch on all stages, and the plan's model on its GPUs comes to "
            f"{own:.3g} s: these are costs of another model, micro-batch or machine; measure this one"
        )


def _sum_up(costs: Costs, stages: int) -> float:
    """Return the seconds of a micro-batch on all stages."""
    return float(sum(sum(spread_over(part, stages, "costs")) for part in (costs.f, costs.i, costs.w)))


def apply_measured(measured: CostsFile, costs: Costs) -> Costs:
    """Return the costs with those of the file in their place, in seconds."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in measured.scale("s").items()
    }
    return replace(costs, **given)
