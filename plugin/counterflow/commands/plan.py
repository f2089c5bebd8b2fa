"""``counterflow plan``: what a layout takes in time and memory, which layout is best, and where its time goes."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from counterflow.commands.arguments import add_outputs, check_outputs, number, whole, write_outputs
from counterflow.errors import PlanError
from counterflow.planner.against import Compared, compare_measured
from counterflow.planner.calibration import Fit, fit_constants, read_runs, tell_apart
from counterflow.planner.choices import OUR_KIND, find_kind
from counterflow.planner.cluster import build_cluster
from counterflow.planner.config import PlanConfig, read_config
from counterflow.planner.constants import Constants
from counterflow.planner.emission import emit_deepspeed, emit_megatron, list_scripted
from counterflow.planner.estimate import Estimate, describe, estimate_config
from counterflow.planner.explain import explain_step, try_changes
from counterflow.planner.layouts import Plan
from counterflow.planner.search import Found, search_layouts
from counterflow.planner.searched import Searched, search_table
from counterflow.planner.splits import split_evenly
from counterflow.report.plan_page import PlanView, render_plan_html
from counterflow.report.plan_text import (
    list_row,
    name_layout,
    name_schedule,
    write_changes,
    write_compared,
    write_count,
    write_estimate,
    write_flags,
    write_price,
    write_rejected,
    write_rows,
    write_unfinished,
    write_waterfall,
)
from counterflow.schedule.files import to_csv

# Of the time that a search is given: for layouts, and seconds for the end; the rest is for a table.
SEARCH_SHARE, RESERVE, LEAST_SECONDS = 0.75, 1.0, 1.0


def add_plan_commands(commands: Any) -> None:
    """Add ``plan`` to the command's parser."""
    parser = commands.add_parser("plan", help="predict a layout's time and memory, search the best one, explain where time goes")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for name, run, words in (
        ("estimate", run_estimate, "time and memory of one layout; what it leaves out is completed, and said"),
        ("search", run_search, "the best layouts of what a plan leaves open, and why others are not"),
        ("explain", run_explain, "where a layout's step goes, and what would change it"),
    ):
        kind = kinds.add_parser(name, help=words)
        kind.add_argument("config", type=Path, metavar="CONFIG.yaml", help="model, cluster, training, layout (docs/plan.md)")
        kind.add_argument("--calibrate", type=Path, nargs="+", metavar="RUN", help="measured runs, CSV or JSON, to fit to")
        kind.add_argument("--price", type=number(0.0), metavar="X", help="of a GPU hour: prints what a trillion tokens cost")
        kind.add_argument("--trainer", choices=("megatron", "deepspeed"), default="megatron", help="whose flags end the output")
        kind.add_argument(
            "--memory", choices=("formula", "dry-run"), default="formula", help="dry-run builds the real model on this machine"
        )
        outputs = ("html", "csv") if name == "search" else ("html",)
        add_outputs(kind, *outputs)
        kind.set_defaults(run=run)
        if name == "search":
            kind.add_argument("--seconds", type=number(0.0), default=50.0, metavar="S", help="of the search (default: 50)")
            kind.add_argument("--top", type=whole(1, 1000), default=5, metavar="N", help="layouts to print (default: 5)")
        if name == "explain":
            kind.add_argument("--against", type=Path, metavar="FILE", help="a trace or record of a step to compare with")


def _calibrate(args: argparse.Namespace) -> Fit | None:
    if args.calibrate is None:
        return None
    return fit_constants([run for path in args.calibrate for run in read_runs(path)])


def _take_constants(fit: Fit | None) -> Constants:
    return Constants() if fit is None else fit.constants


def _estimate(args: argparse.Namespace, config: PlanConfig, fit: Fit | None) -> Estimate:
    estimate = estimate_config(config, _take_constants(fit))
    return _dry_run(estimate) if args.memory == "dry-run" else estimate


def _dry_run(estimate: Estimate) -> Estimate:
    """Return the estimate with the memory that the real model's code needs."""
    from counterflow.megatron.dry_run import measure_memory  # loads torch and Megatron

    memory = measure_memory(estimate.plan)
    return replace(estimate, memory=memory, fits=memory.tell_fit(estimate.setting.cluster.memory_gib * 2**30))


def run_estimate(args: argparse.Namespace) -> int:
    """Print one estimate and its flags."""
    check_outputs(args)
    fit = _calibrate(args)
    estimate = _estimate(args, read_config(args.config), fit)
    write_outputs(args, {"html": lambda: render_plan_html(PlanView((estimate,)), args.config.name)})
    if args.json:
        print(json.dumps(_describe([estimate], None, fit, args), indent=2, allow_nan=False))
        return 0
    print("\n".join([*write_estimate(estimate, args.price), *_write_fit(fit), *_write_flags(estimate, args)]))
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Print the waterfall of one estimate, what would change it, and a measurement beside it."""
    check_outputs(args)
    fit = _calibrate(args)
    estimate = _estimate(args, read_config(args.config), fit)
    bars, changes = explain_step(estimate), try_changes(estimate)
    compared = compare_measured(estimate, args.against) if args.against is not None else None
    view = PlanView((estimate,), bars=bars, changes=changes, compared=compared)
    write_outputs(args, {"html": lambda: render_plan_html(view, args.config.name)})
    if args.json:
        found = _describe([estimate], None, fit, args)
        found["waterfall_s"] = {bar.cause: bar.seconds for bar in bars}
        found["what_if"] = [{"change": one.words, "step_s": one.seconds} for one in changes]
        if compared is not None:
            found["against"] = _list_compared(compared.causes)
            found["against_chunks"] = _list_compared(compared.chunks)
            found["against_notes"] = list(compared.remarks)
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    lines = [*write_estimate(estimate, args.price), *write_waterfall(bars, estimate.step_s)]
    lines += [*write_changes(changes, estimate.step_s), *([] if compared is None else write_compared(compared))]
    print("\n".join([*lines, *_write_fit(fit), *_write_flags(estimate, args)]))
    return 0


def _list_compared(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    return [{"cause": one.cause, "predicted": one.predicted, "measured": one.measured} for one in rows]


@dataclass(frozen=True)
class _Best:
    """What a search ends with: estimates in order, and the table that was searched for one of them."""

    estimates: list[Estimate]
    searched: Searched | None = None

    def is_searched(self, estimate: Estimate) -> bool:
        """Tell whether an estimate is of the searched table."""
        return self.searched is not None and estimate is self.searched.estimate


def run_search(args: argparse.Namespace) -> int:
    """Search, print the best layouts, why others are not, and the flags of the first."""
    check_outputs(args)
    begun = time.monotonic()
    fit, config = _calibrate(args), read_config(args.config)
    if config.costs is not None:
        print(f"counterflow: costs: {config.costs} is of one layout: a search times all by the model", file=sys.stderr)
    constants = _take_constants(fit)
    left = args.seconds - (time.monotonic() - begun)
    found = search_layouts(config, constants, seconds=SEARCH_SHARE * left, keep=args.top)
    best = _improve(found, config, constants, args, begun + args.seconds)
    winner = best.estimates[0]
    searched = best.searched if best.is_searched(winner) else None
    view = PlanView(tuple(best.estimates), found.pareto, explain_step(winner), try_changes(winner), searched)
    forms: dict[str, Callable[[], str | bytes]] = {
        "html": lambda: render_plan_html(view, args.config.name),
    }
    if best.searched is not None:
        table = best.searched.table
        forms["csv"] = lambda: to_csv(table)
    elif args.csv is not None:
        print(f"counterflow: --csv {args.csv} is not written: no searched table is faster than the family's own", file=sys.stderr)
    write_outputs(args, forms)
    if args.json:
        print(
            json.dumps(
                _describe(best.estimates, found, fit, args, None if best.searched is None else best.searched.estimate),
                indent=2,
                allow_nan=False,
            )
        )
        return 0
    rows = [list_row(one, place, best.is_searched(one)) for place, one in enumerate(best.estimates, 1)]
    lines = [
        *write_unfinished(found),
        *write_rows(rows),
        *_write_ties(best.estimates),
        *write_rejected(found),
        *write_price(winner, args.price),
    ]
    lines += _write_saving(found, best, args)
    lines += [f"note: {note}" for note in winner.plan.notes]
    print("\n".join([*lines, *_write_fit(fit), *_write_flags(winner, args, searched)]))
    return 0


def _improve(found: Found, config: PlanConfig, constants: Constants, args: argparse.Namespace, deadline: float) -> _Best:
    """Deal layers more evenly where that is faster; search a table for the best layout of several pipeline ranks."""
    cluster = build_cluster(config.cluster)
    estimates = [split_evenly(one, cluster, constants) for one in found.candidates[: args.top]]
    estimates.sort(key=lambda one: (one.fits is not True, one.step_s))
    searched = None
    if config.layout.schedule is None and (piped := _choose_piped(found, estimates)) is not None:
        searched = search_table(piped, max(deadline - time.monotonic() - RESERVE, LEAST_SECONDS))
    if searched is not None:
        estimates = sorted([searched.estimate, *estimates], key=lambda one: (one.fits is not True, one.step_s))[: args.top]
        searched = searched if any(one is searched.estimate for one in estimates) else None
    if args.memory == "dry-run" and not (searched and estimates[0] is searched.estimate):
        estimates = [_dry_run(estimates[0]), *estimates[1:]]
    return _Best(estimates, searched)


def _choose_piped(found: Found, estimates: list[Estimate]) -> Estimate | None:
    """Return the best layout with a pipeline, whose table may be searched."""
    known = [one for one in (*estimates, found.ours, found.looped) if one is not None and one.plan.layout.pp > 1]
    return min(known, key=lambda one: (one.fits is not True, one.step_s), default=None)


def _write_ties(estimates: list[Estimate]) -> list[str]:
    """Say from which place on the ranking means something, and which rows no published run was compared with."""
    first = estimates[0]
    sigma = first.setting.constants.sigma
    tied = sum(not tell_apart(one.step_s, first.step_s, sigma) for one in estimates)
    lines = [f"the first {tied} cannot be told apart: the model's error is {100 * sigma:.0f} %"] if tied > 1 else []
    if any(one.plan.layout.fsdp and one.plan.layout.ep > 1 for one in estimates):
        lines.append("experts under FSDP were compared with no published run; fsdp: false in layout: leaves them out")
    return lines


def _write_saving(found: Found, result: _Best, args: argparse.Namespace) -> list[str]:
    """Say what the best layout that needs counterflow saves against Megatron's interleaved schedule at its best."""
    looped = found.looped
    known = [one for one in (*result.estimates, found.ours) if one is not None]
    ours = [one for one in known if result.is_searched(one) or find_kind(one.plan) == OUR_KIND]
    best = min(ours, key=lambda one: (one.fits is not True, one.step_s), default=None)
    if looped is None or best is None:
        return []
    sizes = f"{name_layout(looped)} {name_schedule(looped)}, {looped.step_s:.3g} s"
    if looped.step_s <= best.step_s:
        return [f"Megatron's interleaved schedule at its best ({sizes}) is as fast as the best layout that needs counterflow"]
    saved = looped.gpu_hours - best.gpu_hours
    cost = f", {saved * args.price:,.0f}" if args.price is not None else ""
    return [
        f"against Megatron's interleaved schedule at its best ({sizes}) {name_schedule(best, result.is_searched(best))} "
        f"({best.step_s:.3g} s) saves {100 * (1 - best.step_s / looped.step_s):.1f} % of the time, {saved:,.0f} GPU hours a "
        f"trillion tokens{cost}"
    ]


def _write_fit(fit: Fit | None) -> list[str]:
    if fit is None:
        return []
    lines = [f"calibrated on {write_count(len(fit.residuals), 'run')}, error {100 * fit.sigma:.0f} %; identified:"]
    lines += [f"  {name}: {before:.3g} → {after:.3g}" for name, (before, after) in fit.identified.items()]
    return lines + [f"  {name}: {100 * residual:+.1f} %" for name, residual in fit.residuals.items()]


def _write_flags(estimate: Estimate, args: argparse.Namespace, searched: Searched | None = None) -> list[str]:
    """Return the trainer's flags; those of a searched table name the file that it is written to."""
    plan, lines = estimate.plan, []
    if searched is not None:
        plan = _name_table(plan, args)
        lines = [] if args.csv else [f"{plan.layout.schedule}: give --csv FILE, which writes the searched table"]
    try:
        if args.trainer == "deepspeed":
            scripted = list_scripted(plan)
            written = ["DeepSpeed:", json.dumps(emit_deepspeed(plan), indent=2)]
            return [*lines, *([f"not in the JSON, but in the script: {'; '.join(scripted)}"] if scripted else []), *written]
        return [*lines, *write_flags(emit_megatron(plan), {})]
    except PlanError as error:
        return [f"no flags: {error}"]


def _name_table(plan: Plan, args: argparse.Namespace) -> Plan:
    """Return a plan whose schedule is the file of the searched table."""
    return replace(plan, layout=replace(plan.layout, schedule=str(args.csv or "TABLE.csv")))


def _describe(
    estimates: list[Estimate], search: Found | None, fit: Fit | None, args: argparse.Namespace, searched: Estimate | None = None
) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    found: dict[str, Any] = {"candidates": [], "rejected": []}
    for estimate in estimates:
        one = describe(estimate, args.price)
        emit: Callable[[Plan], Any] = emit_deepspeed if args.trainer == "deepspeed" else emit_megatron
        name = "deepspeed_json" if args.trainer == "deepspeed" else "megatron_args"
        try:
            one[name] = emit(_name_table(estimate.plan, args) if estimate is searched else estimate.plan)
        except PlanError as error:
            one[name] = None
            one["why"].append(f"no flags: {error}")
        if args.trainer == "deepspeed":
            one["deepspeed_script"] = list_scripted(estimate.plan)
        found["candidates"].append(one)
    if search is not None:
        found["rejected"] = [{"layout": one.layout, "why": one.reason} for one in search.rejected]
        found |= {"finished": not search.untried, "tried": search.tried, "untried": search.untried, "seconds": search.seconds}
        found["pareto"] = [{"step_s": one.step_s, "memory_gib": max(one.memory.per_rank)} for one in search.pareto]
        for kind, best in (("best_interleaved_s", search.looped), ("best_counterflow_s", search.ours)):
            found[kind] = None if best is None else best.step_s
    if fit is not None:
        found["calibration"] = {
            "sigma": fit.sigma,
            "identified": {name: {"before": old, "after": new} for name, (old, new) in fit.identified.items()},
            "residuals": fit.residuals,
        }
    return found
