"""``counterflow plan``: what a layout takes in time and memory, which layout is best, and where its time goes."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from counterflow.commands.arguments import add_outputs, check_outputs, number, whole, write_outputs
from counterflow.errors import PlanError
from counterflow.planner.calibration import Fit, fit_constants, read_runs, tell_apart
from counterflow.planner.cluster import build_cluster
from counterflow.planner.config import PlanConfig, read_config
from counterflow.planner.constants import Constants
from counterflow.planner.emission import emit_deepspeed, emit_megatron
from counterflow.planner.estimate import Estimate, describe, estimate_config
from counterflow.planner.explain import compare_measured, explain_step, try_changes
from counterflow.planner.search import Found, search_layouts, split_evenly
from counterflow.planner.searched import Searched, search_table
from counterflow.report.plan_page import PlanView, render_plan_html
from counterflow.report.plan_text import (
    list_row,
    write_changes,
    write_compared,
    write_estimate,
    write_flags,
    write_price,
    write_rejected,
    write_rows,
    write_waterfall,
)
from counterflow.schedule.files import to_csv

MOST_REJECTED = 1000


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
        print(json.dumps(_describe([estimate], [], fit, args), indent=2, allow_nan=False))
        return 0
    print("\n".join([*write_estimate(estimate, args.price), *_write_fit(fit), *_write_flags(estimate, args)]))
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Print the waterfall of one estimate, what would change it, and a measurement beside it."""
    check_outputs(args)
    fit = _calibrate(args)
    estimate = _estimate(args, read_config(args.config), fit)
    bars, changes = explain_step(estimate), try_changes(estimate)
    compared = compare_measured(estimate, args.against) if args.against is not None else []
    write_outputs(args, {"html": lambda: render_plan_html(PlanView((estimate,), bars=bars, changes=changes), args.config.name)})
    if args.json:
        found = _describe([estimate], [], fit, args)
        found["waterfall_s"] = {bar.cause: bar.seconds for bar in bars}
        found["what_if"] = [{"change": one.words, "step_s": one.seconds} for one in changes]
        found["against"] = [{"cause": one.cause, "predicted_s": one.predicted, "measured_s": one.measured} for one in compared]
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    lines = [*write_estimate(estimate, args.price), *write_waterfall(bars, estimate.step_s)]
    lines += [*write_changes(changes, estimate.step_s), *(write_compared(compared) if compared else [])]
    print("\n".join([*lines, *_write_fit(fit), *_write_flags(estimate, args)]))
    return 0


@dataclass(frozen=True)
class _Best:
    """What a search ends with: estimates in order, and the table that was searched for one of them."""

    estimates: list[Estimate]
    searched: Searched | None = None


def run_search(args: argparse.Namespace) -> int:
    """Search, print the best layouts, why others are not, and the flags of the first."""
    check_outputs(args)
    fit, config = _calibrate(args), read_config(args.config)
    found = search_layouts(config, _take_constants(fit), seconds=0.8 * args.seconds, keep=args.top)
    best = _improve(found, config, _take_constants(fit), args)
    winner = best.estimates[0]
    view = PlanView(tuple(best.estimates), found.pareto, explain_step(winner), try_changes(winner), best.searched)
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
        print(json.dumps(_describe(best.estimates, found.rejected, fit, args), indent=2, allow_nan=False))
        return 0
    is_searched = best.searched is not None
    rows = [list_row(one, place, place == 1 and is_searched) for place, one in enumerate(best.estimates, 1)]
    lines = [*write_rows(rows), *_write_ties(best.estimates), *write_rejected(found), *write_price(winner, args.price)]
    lines += _write_saving(found, winner, config, args)
    print("\n".join([*lines, *_write_fit(fit), *_write_flags(winner, args)]))
    return 0


def _improve(found: Found, config: PlanConfig, constants: Constants, args: argparse.Namespace) -> _Best:
    """Deal layers more evenly where that is faster; search a table for the best layout of stages."""
    cluster = build_cluster(config.cluster)
    estimates = [split_evenly(one, config, cluster, constants) for one in found.candidates[: args.top]]
    estimates.sort(key=lambda one: (one.fits is not True, one.step_s))
    searched = search_table(estimates[0], 0.2 * args.seconds) if config.layout.schedule is None else None
    if searched is not None:
        estimates = [searched.estimate, *estimates][: args.top]
    if args.memory == "dry-run":
        estimates = [_dry_run(estimates[0]), *estimates[1:]]
    return _Best(estimates, searched)


def _write_ties(estimates: list[Estimate]) -> list[str]:
    """Say from which place on the ranking means something."""
    first = estimates[0]
    sigma = first.setting.constants.sigma
    tied = sum(not tell_apart(one.step_s, first.step_s, sigma) for one in estimates)
    return [f"the first {tied} cannot be told apart: the model's error is {100 * sigma:.0f} %"] if tied > 1 else []


def _write_saving(found: Found, winner: Estimate, config: PlanConfig, args: argparse.Namespace) -> list[str]:
    """Say what is saved against the best layout that Megatron runs itself."""
    plain = found.plain
    if plain is None or plain.step_s <= winner.step_s:
        return []
    saved = plain.gpu_hours - winner.gpu_hours
    cost = f", {saved * args.price:,.0f}" if args.price is not None else ""
    sizes = f"{plain.plan.layout.schedule} vpp {plain.plan.layout.vpp}"
    return [
        f"against Megatron's best ({sizes}, {plain.step_s:.3g} s): {100 * (1 - winner.step_s / plain.step_s):.1f} % of the time, "
        f"{saved:,.0f} GPU hours a trillion tokens{cost}"
    ]


def _write_fit(fit: Fit | None) -> list[str]:
    if fit is None:
        return []
    lines = [f"calibrated on {len(fit.residuals)} runs, error {100 * fit.sigma:.0f} %; identified:"]
    lines += [f"  {name}: {before:.3g} → {after:.3g}" for name, (before, after) in fit.identified.items()]
    return lines + [f"  {name}: {100 * residual:+.1f} %" for name, residual in fit.residuals.items()]


def _write_flags(estimate: Estimate, args: argparse.Namespace) -> list[str]:
    try:
        if args.trainer == "deepspeed":
            return ["DeepSpeed:", json.dumps(emit_deepspeed(estimate.plan), indent=2)]
        return write_flags(emit_megatron(estimate.plan), {})
    except PlanError as error:
        return [f"no flags: {error}"]


def _describe(estimates: list[Estimate], rejected: Any, fit: Fit | None, args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    found: dict[str, Any] = {"candidates": [], "rejected": []}
    for estimate in estimates:
        one = describe(estimate, args.price)
        try:
            one["megatron_args"] = emit_megatron(estimate.plan)
        except PlanError as error:
            one["megatron_args"] = []
            one["why"].append(f"no flags: {error}")
        found["candidates"].append(one)
    found["rejected"] = [{"layout": one.layout, "why": one.reason} for one in rejected[:MOST_REJECTED]]
    found["rejected_in_all"] = len(rejected)
    if fit is not None:
        found["calibration"] = {
            "sigma": fit.sigma,
            "identified": {name: {"before": old, "after": new} for name, (old, new) in fit.identified.items()},
            "residuals": fit.residuals,
        }
    return found
