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


# Costs that are further off than the first are not of the plan: past errors of the model are below a half. Beyond the second it
# is said.
MOST_OFF, FAR_OFF = 4.0, 1.5


def check_measured(measured: CostsFile, costs: Costs, name: str) -> float:
    """Return a micro-batch's seconds as measured over the model's own.

    Raises `PlanError` for costs that are so far from the model's own that they are those of another model or machine.
    """
    # A number alone is that of each stage; the model's own costs are by stage.
    stages = len(costs.f) if isinstance(costs.f, Sequence) else 1
    whole, own = (_sum_up(one, stages) for one in (apply_measured(measured, costs), costs))
    if not own / MOST_OFF <= whole <= own * MOST_OFF:
        raise PlanError(
            f"costs: {name} says {whole:.3g} s for a micro-batch on all stages, and the plan's model on its GPUs comes to "
            f"{own:.3g} s: these are costs of another model, micro-batch or machine; measure this one"
        )
    return whole / own


def note_measured(measured: CostsFile, name: str, off: float) -> list[str]:
    """Return where a plan's costs are from, what of them is the model's, and how far they are off the model's own."""
    source = f" ({measured.source})" if measured.source else ""
    own = [words for key, words in _NAMED.items() if key not in measured.given]
    rest = f"; {' and '.join(own)} are the model's" if own else ""
    notes = [f"costs of chunks are those of {name}{source}{rest}; the model says what a chunk's time consists of"]
    if not 1 / FAR_OFF <= off <= FAR_OFF:
        notes.append(
            f"costs: a micro-batch takes {off:.2g} times what the plan's model says: see whether they are of this model, layout "
            f"and machine"
        )
    return notes


_NAMED = {"p2p": "messages", "overlap": "pairs", "reduce": "reductions"}


def _sum_up(costs: Costs, stages: int) -> float:
    """Return the seconds of a micro-batch on all stages."""
    return float(sum(sum(spread_over(part, stages, "costs")) for part in (costs.f, costs.i, costs.w)))


def apply_measured(measured: CostsFile, costs: Costs) -> Costs:
    """Return the costs with those of the file in their place, in seconds."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in measured.scale("s").items()
    }
    return replace(costs, **given)


def change_measured(costs: Costs, before: Costs, after: Costs) -> Costs:
    """Return measured ``costs`` by stage under a change that takes the model's own from ``before`` to ``after``."""

    def change(name: str) -> tuple[float, ...]:
        parts = (getattr(one, name) for one in (costs, before, after))
        return tuple(
            own * new / old if old else max(own, new) for own, old, new in zip(*(_list(part) for part in parts), strict=True)
        )

    stages = len(_list(after.f))
    costs, before, after = (one.spread(stages) for one in (costs, before, after))
    return replace(
        costs, f=change("f"), i=change("i"), w=change("w"), reduce=change("reduce"),
        p2p=costs.p2p * after.p2p / before.p2p if before.p2p else max(costs.p2p, after.p2p),
        overlap=min(costs.overlap * after.overlap / before.overlap, 2.0),
    )  # fmt: skip


def _list(cost: object) -> tuple[float, ...]:
    assert isinstance(cost, tuple)
    return cost
