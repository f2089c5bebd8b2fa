"""Layers dealt unevenly over stages, where embedding, head and MTP make the ends longer."""

from collections.abc import Sequence
from dataclasses import replace

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.assumptions import Assumed
from counterflow.planner.cluster import Cluster
from counterflow.planner.constants import Constants
from counterflow.planner.emission import find_refusal
from counterflow.planner.estimate import Estimate, estimate_plan
from counterflow.planner.layouts import Plan, deal_layers
from counterflow.planner.times import Setting, Work, time_embedding, time_head, time_layer, time_mtp


def split_evenly(estimate: Estimate, cluster: Cluster, constants: Constants) -> Estimate:
    """Return the plan with layers dealt unevenly where that is faster and fits as surely, else the same.

    Ends with embedding, head and MTP get fewer layers: by number, or by how long each takes.
    """
    plan, setting = estimate.plan, estimate.setting
    layout = plan.layout
    if layout.pp == 1 or layout.pipeline_layout is not None or layout.first_stage_layers or layout.last_stage_layers:
        return estimate
    best = estimate
    for text in dict.fromkeys(
        (deal_layers(len(plan.model.layers), layout.stages, plan.model.mtp_layers), deal_by_time(plan, setting))
    ):
        dealt = replace(layout, pipeline_layout=text, account_for_embedding=False, account_for_loss=False)
        other = replace(plan, layout=dealt)
        if find_refusal(other):
            continue
        try:
            one = estimate_plan(Assumed(other, setting.fp8_attention, setting.fused_permute), cluster, constants)
        except (PlanError, ScheduleError):
            continue
        if one.step_s < best.step_s and (one.fits or not estimate.fits) and one.fits is not False:
            best = one
    return best


def deal_by_time(plan: Plan, setting: Setting) -> str:
    """Return a layout, as Megatron writes it, whose slowest stage is as fast as it can be; each stage holds a layer at least."""
    stages, times = plan.layout.stages, _time_units(plan, setting)
    low, high = max(seconds for _, seconds in times), sum(seconds for _, seconds in times)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_fill(times, middle, stages)) <= stages else (middle, high)
    return "|".join(_fill(times, high, stages))


def _time_units(plan: Plan, setting: Setting) -> list[tuple[str, float]]:
    """Return what cannot be cut, in order, and how long each takes: layers, and what is bound to the first and the last."""
    model, local = plan.model, setting.local
    layers = [_sum_up(time_layer(layer, local)) for layer in model.layers]
    units = [("t", seconds) for seconds in layers]
    end = _sum_up(time_head(model, setting)) + model.mtp_layers * _sum_up(time_mtp(model, setting))
    units[0] = ("Et", units[0][1] + _sum_up(time_embedding(model, setting)))
    return [*units, ("m" * model.mtp_layers + "L", end)]


def _sum_up(work: Work) -> float:
    return work.f.seconds + (work.i + work.w).seconds


def _fill(units: Sequence[tuple[str, float]], most: float, stages: int) -> list[str]:
    """Fill stages from the end, each up to ``most`` seconds, but leave a unit for each of the first ones."""
    found: list[str] = []
    text, filled = "", 0.0
    for number in range(len(units) - 1, -1, -1):
        name, seconds = units[number]
        # So many units are left, this one too, for the stages that are not begun.
        is_needed = number + 1 <= stages - len(found) - 1
        if text and (filled + seconds > most * (1 + 1e-9) or is_needed):
            found.append(text)
            text, filled = "", 0.0
        text, filled = name + text, filled + seconds
    return [text, *reversed(found)]
