"""``counterflow schedule``: look at schedules, compare them, search for one."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from counterflow.commands.arguments import add_outputs, check_outputs, number, numbers, print_table, whole, write_outputs
from counterflow.errors import OptionError, ScheduleError
from counterflow.report import (
    Picture,
    describe_differences,
    render_html,
    render_svg,
    render_text,
    render_trace,
    write_differences,
)
from counterflow.schedule import FAMILIES, Costs, ScheduleTable, add_reductions, build, load_record, read_csv, simulate, to_csv
from counterflow.schedule.comparison import compare, estimate_costs, fit_record
from counterflow.schedule.costs import LARGEST_COST, LEAST_OVERLAP, MOST_OVERLAP
from counterflow.schedule.families import list_names, require_size
from counterflow.schedule.timeline import find_last_step
from counterflow.schedule.transport import TRANSPORTS, count_receives_ahead

# What a command takes on, so that it ends within half a minute: ranks; ranks x micro-batches x chunks of what is shown, of what
# is compared, of a search; cells of files; stages of a search. A search takes as long as it is told to, besides.
MAX_RANKS, MAX_RUNS, MAX_COMPARED_RUNS, MAX_CELLS = 2**8, 2**17, 2**16, 2**20
MAX_SEARCHED_RUNS, MAX_SEARCHED_STAGES, MAX_SECONDS = 2**15, 2**8, 3600
MAX_STEP = 2**53
OUTPUTS: dict[str, Callable[[list[Picture]], str]] = {"html": render_html, "svg": render_svg, "trace": render_trace}


def add_schedule_commands(commands: Any) -> None:
    """Add ``schedule show``, ``compare`` and ``search`` to the command's parser."""
    schedule = commands.add_parser("schedule", help="show, compare and search pipeline schedules")
    kinds = schedule.add_subparsers(required=True, metavar="COMMAND")
    show = kinds.add_parser("show", help="simulate one schedule and draw it")
    show.add_argument("schedule", metavar="NAME|FILE.csv", help=f"{', '.join(FAMILIES)}, or a table in CSV")
    _add_record(show)
    show.set_defaults(run=run_show)
    compare = kinds.add_parser("compare", help="simulate several schedules for the same model, side by side")
    compare.add_argument(
        "schedules", metavar="NAME|FILE.csv", nargs="*", help="schedules to compare (default: all that fit these sizes)"
    )
    compare.set_defaults(run=run_compare)
    search = kinds.add_parser("search", help="search a schedule for these costs and this memory")
    search.set_defaults(run=run_search)
    for parser in (show, compare, search):
        _add_sizes(parser, parser is show)
        _add_costs(parser, "chunk" if parser is show else "slice of the model (--max-chunks a rank)")
        add_outputs(parser, *OUTPUTS, "csv")
    chunked, overlapping = (", ".join(list_names(option=option)) for option in ("vpp", "ep_overlap"))
    for parser in (show, compare):
        parser.add_argument("--vpp", type=whole(2, MAX_RUNS), metavar="N", help=f"chunks per rank of {chunked} (default: 2)")
        parser.add_argument(
            "--ep-overlap", action="store_true", help=f"{overlapping} with Megatron's expert-communication overlap"
        )
    for parser in (compare, search):
        parser.add_argument(
            "--max-chunks", type=whole(1, MAX_RUNS), default=2, metavar="N", help="chunks per rank at most (default: 2)"
        )
        parser.add_argument(
            "--max-activations", type=number(), metavar="N", help="cap on a rank's live activations, in micro-batches"
        )
    search.add_argument(
        "--seconds", type=number(0, MAX_SECONDS), default=15.0, metavar="S", help="time to search, an hour at most (default: 15)"
    )
    search.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help="another seed, another search (default: 0)"
    )


def _add_sizes(parser: argparse.ArgumentParser, from_file: bool) -> None:
    needed = "; a file brings its own" if from_file else ""
    for name, most, metavar, words in (
        ("--ranks", MAX_RANKS, "P", "pipeline ranks"),
        ("--microbatches", MAX_RUNS, "M", "micro-batches per step"),
    ):
        parser.add_argument(name, type=whole(1, most), required=not from_file, metavar=metavar, help=f"{words}{needed}")


def _add_costs(parser: argparse.ArgumentParser, unit: str) -> None:
    group = parser.add_argument_group(
        "costs", f"times of one micro-batch on one {unit}, in any one unit: a number, or one per stage"
    )
    default, costs = "default: a rank's share is 1", numbers(0, LARGEST_COST)
    group.add_argument("--f", type=costs, metavar="T[,T…]", help=f"forward ({default})")
    group.add_argument("--i", type=costs, metavar="T[,T…]", help=f"input gradient ({default})")
    group.add_argument("--w", type=costs, metavar="T[,T…]", help=f"weight gradient ({default})")
    group.add_argument(
        "--p2p",
        type=number(0, LARGEST_COST),
        default=0.0,
        metavar="T",
        help="time a result takes to the next rank (default: 0)",
    )
    group.add_argument(
        "--overlap",
        type=number(LEAST_OVERLAP, MOST_OVERLAP),
        metavar="X",
        help="time of an overlapped pair over the sum of its parts (default: 1)",
    )
    group.add_argument(
        "--reduce",
        type=costs,
        default=0.0,
        metavar="T[,T…]",
        help="gradient reduction, once a step, beside what is computed; tables without reductions get them (default: 0)",
    )
    group.add_argument("--p2p-stops", action="store_true", help="ranks stop for transfers instead of computing beside them")
    group.add_argument("--activation-bytes", type=costs, metavar="N[,N…]", help="a chunk's activations of a micro-batch")
    group.add_argument("--queued-bytes", type=costs, metavar="N[,N…]", help="what a queued weight gradient keeps")


def _add_record(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a recorded step", "lays what was measured over the simulation; costs are in seconds then, by default those of the record"
    )
    group.add_argument("--record", type=Path, metavar="DIR", help="the folder that --cf-record wrote")
    group.add_argument(
        "--step", type=whole(0, MAX_STEP), metavar="N", help="the recorded step (default: the last that all ranks have)"
    )
    group.add_argument(
        "--pipeline",
        type=whole(0, MAX_STEP),
        metavar="N",
        help="of data-parallel pipelines, the global rank of one's first rank (default: 0)",
    )


def run_show(args: argparse.Namespace) -> int:
    """Draw one schedule in the terminal and into the files asked for."""
    check_outputs(args)
    table = _load_table(args.schedule, args)
    if args.record is not None:
        return _show_record(args, table)
    for name in ("step", "pipeline"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name} {getattr(args, name)} given without a record; add --record DIR or drop --{name}")
    table = add_reductions(table) if args.reduce else table
    picture = Picture(args.schedule, table, simulate(table, _make_costs(args, table.layout.chunk_share)))
    _write_outputs(args, [picture])
    if args.json:
        print(json.dumps(describe(picture), indent=2))
    else:
        print(render_text(picture, _find_width(), sys.stdout.isatty()).rstrip())
        ahead = ", ".join(f"{count} under {transport} P2P" for transport, count in _count_ahead(table).items())
        print(f"receives to keep posted ahead: {ahead}")
        if table.is_forward_only:
            print("forwards alone: a step of evaluation, not a table to train with")
    return 0


def _show_record(args: argparse.Namespace, table: ScheduleTable) -> int:
    """Draw a recorded step over its simulation, and say where the two part."""
    if args.reduce:
        raise OptionError("--reduce given with a record, which shows no reductions; drop --reduce or --record")
    pipeline = args.pipeline or 0
    step = find_last_step(args.record, pipeline) if args.step is None else args.step
    recorded = load_record(args.record, step, pipeline)
    try:
        ran, measured = fit_record(table, recorded)
    except ScheduleError as error:
        ran_in_pairs = any(span.action.parts for span in recorded.spans)
        takes_pairs = args.schedule in list_names(option="ep_overlap") and not args.ep_overlap
        hint = "; it ran with --cf-overlap: add --ep-overlap" if ran_in_pairs and takes_pairs else ""
        raise ScheduleError(f"{args.record}, step {step}, and {args.schedule} do not fit: {error}{hint}") from None
    found = estimate_costs(ran, measured, args.f, args.i, args.w, args.overlap)
    costs = replace(found, p2p=args.p2p, p2p_overlaps=not args.p2p_stops)
    comparison = compare(ran, measured, simulate(ran, costs), costs.p2p)
    pictures = [
        Picture(f"{args.schedule}: simulated", ran, comparison.simulated),
        Picture(f"{args.schedule}: measured (step {step})", ran, measured),
    ]
    _write_outputs(args, pictures)
    if args.json:
        print(json.dumps({"schedule": args.schedule, "step": step, **describe_differences(comparison, costs)}, indent=2))
        return 0
    for picture in pictures:
        print(render_text(picture, _find_width(), sys.stdout.isatty()).rstrip())
    print(write_differences(comparison, costs).rstrip())
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Print a line per schedule, fastest first, and write the files asked for."""
    from counterflow.schedule.search import list_families, merge_costs  # loads a compiler

    check_outputs(args)
    require_size(args.ranks, args.microbatches, args.max_chunks, MAX_COMPARED_RUNS)
    costs = _make_costs(args, 1 / args.max_chunks).spread(args.ranks * args.max_chunks)
    cap = float("inf") if args.max_activations is None else args.max_activations
    pictures = []
    for name in args.schedules:
        table = _load_table(name, args, len(args.schedules))
        table = add_reductions(table) if args.reduce else table
        merged = merge_costs(costs, table.layout.last_stage + 1)
        pictures.append(Picture(_title(table, name), table, simulate(table, merged)))
    if not args.schedules:
        known = list_families(args.ranks, args.microbatches, costs, args.max_chunks, cap)
        pictures = [Picture(_title(table, table.name), table, timeline) for table, timeline in known]
    if len(kinds := {picture.table.is_forward_only: picture.title for picture in pictures}) > 1:
        raise OptionError(f"{kinds[True]} has forwards alone and {kinds[False]} backwards too: compare the two kinds apart")
    if not pictures:
        raise ScheduleError(f"no schedule fits {args.ranks} ranks, {args.microbatches} micro-batches and a cap of {cap:g}")
    pictures.sort(key=lambda picture: picture.timeline.makespan)
    _write_outputs(args, pictures)
    if args.json:
        print(json.dumps([describe(picture) for picture in pictures], indent=2))
    else:
        _print_comparison(pictures)
    return 0


def run_search(args: argparse.Namespace) -> int:
    """Search, draw what was found, and say how it compares."""
    from counterflow.schedule.search import search  # loads a compiler

    check_outputs(args)
    require_size(args.ranks, args.microbatches, args.max_chunks, MAX_SEARCHED_RUNS)
    if args.ranks * args.max_chunks > MAX_SEARCHED_STAGES:
        raise ScheduleError(
            f"{args.ranks} ranks x {args.max_chunks} chunks given; allowed: {MAX_SEARCHED_STAGES} stages at most in a search, "
            "so give fewer ranks or a smaller --max-chunks"
        )
    if sys.stderr.isatty():
        print(
            f"searching for {args.seconds:g} s (an installation's first search compiles first)",
            file=sys.stderr,
        )
    found = search(
        args.ranks, args.microbatches, _make_costs(args, 1 / args.max_chunks), max_chunks=args.max_chunks,
        max_activations=args.max_activations, seconds=args.seconds, seed=args.seed,
    )  # fmt: skip
    picture = Picture(f"{found.table.name} ({found.table.layout.name})", found.table, found.timeline)
    _write_outputs(args, [picture])
    if args.json:
        extra = {"lower_bound": found.lower_bound, "gap": found.gap, "best_family": found.family}
        print(json.dumps(describe(picture) | extra | {"best_family_makespan": found.family_makespan}, indent=2))
        return 0
    print(render_text(picture, _find_width(), sys.stdout.isatty()).rstrip())
    family = f"best family {found.family} {found.family_makespan:g}" if found.family else "no family fits the cap"
    print(f"makespan {found.timeline.makespan:g}; lower bound {found.lower_bound:g} (gap {100 * found.gap:.2f} %); {family}")
    if args.csv is None:
        print("keep it with --csv FILE; train with --cf-schedule FILE")
    return 0


def describe(picture: Picture) -> dict[str, Any]:
    """Return a picture's figures, as ``--json`` prints them."""
    table, timeline = picture.table, picture.timeline
    return {
        "schedule": picture.title,
        "layout": table.layout.name,
        "ranks": table.ranks,
        "microbatches": table.microbatches,
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "peak_activations": timeline.peak_activations,
        "peak_queued": timeline.peak_queued,
        "peak_bytes": timeline.peak_bytes,
        "receives_ahead": _count_ahead(table),
    }


def _print_comparison(pictures: list[Picture]) -> None:
    rows = []
    for picture in pictures:
        timeline = picture.timeline
        rows.append([
            picture.title, picture.table.layout.name, f"{timeline.makespan:.6g}", f"{100 * timeline.bubble:.2f} %",
            f"{max(timeline.peak_activations):g}", f"{max(timeline.peak_queued):g}",
        ])  # fmt: skip
    print_table(["schedule", "layout", "makespan", "bubble", "activations", "queued W"], rows, left=2)


def _title(table: ScheduleTable, name: str) -> str:
    if table.name not in list_names(option="vpp"):
        return name
    paired = any(action.parts for action in table.actions[0])
    return f"{name} vpp {table.layout.chunks}" + (" ep-overlap" if paired else "")


def _count_ahead(table: ScheduleTable) -> dict[str, int]:
    return {transport: count_receives_ahead(table, transport) for transport in TRANSPORTS}


def _load_table(name: str, args: argparse.Namespace, of: int = 1) -> ScheduleTable:
    """Read or build a table, one of so many that the command can do with."""
    if name.lower().endswith(".csv"):
        table = read_csv(Path(name), MAX_CELLS // of)
        sizes = (("ranks", args.ranks, table.ranks), ("microbatches", args.microbatches, table.microbatches))
        for what, asked, has in sizes:
            if asked is not None and asked != has:
                raise OptionError(f"--{what} {asked} given; {name} has {has}: drop --{what} or give another file")
        return table
    if args.ranks is None or args.microbatches is None:
        raise OptionError(f"schedule {name} given without its size; add --ranks P and --microbatches M")
    options = {"vpp": args.vpp} if args.vpp is not None else {}
    options |= {"ep_overlap": True} if args.ep_overlap else {}
    options = {option: value for option, value in options.items() if name in list_names(option=option)}
    require_size(args.ranks, args.microbatches, options.get("vpp", 2), MAX_RUNS // of)
    return build(name, args.ranks, args.microbatches, **options)


def _make_costs(args: argparse.Namespace, default: float) -> Costs:
    f, i, w = (default if value is None else value for value in (args.f, args.i, args.w))
    return Costs(
        f, i, w, p2p=args.p2p, overlap=1.0 if args.overlap is None else args.overlap, p2p_overlaps=not args.p2p_stops,
        activation_bytes=args.activation_bytes, queued_bytes=args.queued_bytes, reduce=args.reduce,
    )  # fmt: skip


def _find_width() -> int:
    return max(60, min(200, os.get_terminal_size().columns)) if sys.stdout.isatty() else 100


def _write_outputs(args: argparse.Namespace, pictures: list[Picture]) -> None:
    if args.csv is not None and len({picture.table for picture in pictures}) > 1:
        raise OptionError(f"--csv {args.csv} takes one table and {len(pictures)} were compared; use schedule show")
    forms: dict[str, Callable[[], str | bytes]] = {name: partial(render, pictures) for name, render in OUTPUTS.items()}
    write_outputs(args, forms | {"csv": lambda: to_csv(pictures[0].table)})
