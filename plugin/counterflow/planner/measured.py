"""Measured costs of a model chunk in place of the model's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.layouts import Plan
from counterflow.schedule import Costs
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


def apply_measured(measured: CostsFile, costs: Costs) -> Costs:
    """Return the costs with those of the file in their place, in seconds."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in measured.scale("s").items()
    }
    return replace(costs, **given)
