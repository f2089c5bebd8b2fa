"""``counterflow analyze``: where the time of a recorded step went, and what would gain how much."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterflow.analysis import Device, Family, Trace, analyze_trace, read_families, read_traces
from counterflow.analysis.alternatives import list_alternatives
from counterflow.analysis.chunks import find_costs, sum_parts
from counterflow.analysis.cluster import Rank, check_files, compare_ranks
from counterflow.analysis.comparison import Comparison, compare_devices, describe_comparison
from counterflow.analysis.figures import describe_device, describe_file, describe_rank
from counterflow.analysis.gains import (
    Gain,
    describe_gain,
    list_cluster_gains,
    list_gains,
    list_unknown,
    name_schedule_gain,
    rank_gains,
)
from counterflow.commands.arguments import add_outputs, check_outputs, write_outputs
from counterflow.errors import TraceError
from counterflow.report import Findings, render_findings_html, render_findings_svg, render_findings_trace
from counterflow.report.overlap_text import write_comparison, write_device, write_gains, write_ranks

MAX_FILES = 1024


def add_analyze_command(commands: Any) -> None:
    """Add ``analyze`` to the command's parser."""
    parser = commands.add_parser("analyze", help="say where the time of a profiled step went, and what would gain how much")
    parser.add_argument(
        "traces",
        type=Path,
        nargs="+",
        metavar="TRACE",
        help="PyTorch profiler JSON or .json.gz, Nsight Systems SQLite, or a folder of --cf-profile or --cf-record; one per rank",
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="families of kernels of your own, in TOML")
    parser.add_argument("--against", type=Path, metavar="TRACE", help="a trace, record or simulated timeline to compare with")
    add_outputs(parser, "html", "svg", "trace", "costs")
    parser.set_defaults(run=run_analyze)


def run_analyze(args: argparse.Namespace) -> int:
    """Read, analyse, print and write what was asked for."""
    check_outputs(args)
    if len(args.traces) > MAX_FILES:
        raise TraceError(f"{len(args.traces)} traces given; allowed: {MAX_FILES} at most")
    families = read_families(args.classes) if args.classes is not None else ()
    _check_paths(args.traces)
    traces = [trace for path in args.traces for trace in read_traces(path)]
    check_files(traces)
    devices = [device for trace in traces for device in analyze_trace(trace, families)]
    ranks = compare_ranks(devices)
    against = _compare(args.against, devices, families) if args.against is not None else []
    costs = _find_costs(devices) if args.costs is not None else {}
    gains, unknown = _list_gains(devices, ranks)
    title = ", ".join(path.name for path in args.traces)
    write_outputs(
        args,
        {
            "html": lambda: render_findings_html(_gather(traces, devices, ranks, gains, unknown, against), title),
            "svg": lambda: render_findings_svg(devices),
            "trace": lambda: render_findings_trace(devices),
            "costs": lambda: json.dumps(costs, indent=2) + "\n",
        },
    )
    if args.json:
        print(json.dumps(_describe(traces, devices, ranks, gains, unknown, against), indent=2, allow_nan=False))
    else:
        print("\n".join(_write(traces, devices, ranks, gains, unknown, against, args.costs)))
    return 0


def _check_paths(paths: Sequence[Path]) -> None:
    known: dict[str, Path] = {}
    for path in paths:
        if (same := known.setdefault(str(path.absolute()), path)) is not path:
            raise TraceError(f"{same} is given twice; give one file per rank")


def _compare(path: Path, devices: Sequence[Device], families: Sequence[Family]) -> list[Comparison]:
    return compare_devices([d for trace in read_traces(path) for d in analyze_trace(trace, families)], devices)


def _find_costs(devices: Sequence[Device]) -> dict[str, Any]:
    names = ", ".join(dict.fromkeys(Path(device.trace.path).name for device in devices))
    return find_costs(devices, f"counterflow analyze {names}")


def _list_gains(devices: Sequence[Device], ranks: Sequence[Rank]) -> tuple[list[list[Gain]], list[str]]:
    """Return each device's gains, then those of all together; and what is not known."""
    shared = list_cluster_gains(ranks) if len(ranks) > 1 else []
    alternatives = list_alternatives(devices)
    schedule = name_schedule_gain(alternatives, max(device.window for device in devices))
    shared += [schedule] if schedule is not None else []
    unknown = list_unknown(ranks, knows_schedules=alternatives is not None)
    return [*map(list_gains, devices), rank_gains(shared)], unknown


def _gather(
    traces: Sequence[Trace],
    devices: Sequence[Device],
    ranks: Sequence[Rank],
    gains: Sequence[Sequence[Gain]],
    unknown: Sequence[str],
    against: Sequence[Comparison],
) -> Findings:
    """Return what the page shows; of one device all gains are its own."""
    cuts = [trace.cut for trace in traces if trace.cut]
    if len(devices) == 1:
        return Findings(devices, [rank_gains([*gains[0], *gains[-1]])], (), unknown, (), against, cuts)
    return Findings(devices, gains[:-1], gains[-1], unknown, ranks, against, cuts)


def _describe(
    traces: Sequence[Trace],
    devices: Sequence[Device],
    ranks: Sequence[Rank],
    gains: Sequence[Sequence[Gain]],
    unknown: Sequence[str],
    against: Sequence[Comparison],
) -> dict[str, Any]:
    described = [
        describe_device(device) | {"what_if": [describe_gain(gain) for gain in own]}
        for device, own in zip(devices, gains, strict=False)
    ]
    return {
        "devices": described,
        "files": [describe_file(trace) for trace in traces],
        "ranks": [describe_rank(rank) for rank in ranks] if len(ranks) > 1 else [],
        "what_if": [describe_gain(gain) for gain in gains[-1]],
        "what_if_unknown": list(unknown),
        "against": [describe_comparison(comparison) for comparison in against],
    }


def _write(
    traces: Sequence[Trace],
    devices: Sequence[Device],
    ranks: Sequence[Rank],
    gains: Sequence[Sequence[Gain]],
    unknown: Sequence[str],
    against: Sequence[Comparison],
    costs: Path | None,
) -> list[str]:
    lines = [trace.cut for trace in traces if trace.cut]
    command = "counterflow schedule compare --costs"
    hint = f"    → {command} {costs}" if costs else f"    → --costs FILE, then {command} FILE"
    for device, own in zip(devices, gains, strict=False):
        lines += write_device(device, hint if sum_parts(device) else "")
        lines += write_gains(rank_gains([*own, *(gains[-1] if len(devices) == 1 else ())]))
    if len(ranks) > 1:
        lines += [*write_ranks(ranks), *write_gains(gains[-1])]
    lines += [f"  unknown: {words}" for words in unknown]
    for comparison in against:
        lines += write_comparison(comparison)
    return lines
