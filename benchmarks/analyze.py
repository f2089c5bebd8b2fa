"""Measures the analyser of traces: agreement with an independent one, invariance, time and memory of a gigabyte, costs."""

import argparse
import gzip
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from counterflow.analysis import analyze_trace, read_trace
from counterflow.analysis.chunks import estimate_spans
from counterflow.analysis.figures import describe_device
from counterflow.analysis.kineto import read_kineto
from counterflow.schedule import Costs, Span, build, simulate
from counterflow.schedule.annotations import read_annotation
from ranks import start_ranks
from tests.support.made_trace import EXPORTS, ORACLE, PUBLISHED, load_oracle
from tests.unit.test_trace_figures import CHANGES, WORDS

GIGABYTE = 1e9
# Of the profiled run.
RANKS, MICROBATCHES = 4, 12
# Its first and its last profiled step.
PROFILED = 3, 8
# What one repetition is shifted by, in microseconds and in correlations.
SHIFT, CORRELATIONS = 2_000_000, 10**7
# The peak of this program's own memory, in KiB; what getrusage gives begins with the memory of the process that forked.
ANALYZE = """import sys
from pathlib import Path
from counterflow.commands.main import main
try:
    main(sys.argv[1:])
finally:
    print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
# The same of HTA: its peak, and what share of communication it finds hidden.
HTA = """import sys
from pathlib import Path
from hta.trace_analysis import TraceAnalysis
found = TraceAnalysis(trace_dir=sys.argv[1]).get_comm_comp_overlap(visualize=False)
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(peak, found["comp_comm_overlap_pctg"].iloc[0])
"""
NUMBERS = re.compile(rb'("ts": )(\d+)|("correlation": )(\d+)')


def main() -> None:
    """Measure what is asked for, all by default, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--gigabytes", type=float, default=1.0, metavar="X", help="size of the repeated trace (default: 1)")
    parser.add_argument("--hta", metavar="PYTHON", help="an interpreter that has HolisticTraceAnalysis, for the part hta")
    given = parser.parse_args()
    for part in given.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; allowed: {', '.join(PARTS)}")
    if not PUBLISHED[0].is_file():
        print(f"{PUBLISHED[0]} is not there: nothing to measure")
        return
    for part in given.parts or PARTS:
        print(f"== {part}", flush=True)
        PARTS[part](given)


def measure_agreement(given: argparse.Namespace) -> None:
    """Print the largest relative difference from the independent analyser's figures, file by file."""
    if not ORACLE.is_file():
        print(f"{ORACLE} is not there")
        return
    oracle = load_oracle()
    for path in (*PUBLISHED, *EXPORTS):
        try:
            expected = oracle.analyse(str(path))["devices"]
        except oracle.TraceError as reason:
            print(f"{path.name}: no figures ({reason})")
            continue
        pairs = [
            pair for device in _analyze(path) for pair in _pair_figures(device, expected[str(device["device"])])
        ]  # fmt: skip
        worst = max(abs(ours - theirs) / max(abs(theirs), 1.0) for ours, theirs in pairs)
        print(f"{path.name}: {len(pairs)} figures of {len(expected)} devices, largest difference {100 * worst:.4f} %")


def _pair_figures(device: dict[str, Any], expected: dict[str, Any]) -> list[tuple[float, float]]:
    pairs = [(device[ours], expected[theirs]) for ours, theirs in WORDS.items()]
    for kind, figures in expected["comm_kinds"].items():
        own = device["kinds"]["other_communication" if kind == "other" else kind]
        pairs += [(own[ours], figures[theirs]) for ours, theirs in (("us", "union"), ("exposed_us", "exposed"))]
    for phase in device["phases"]:
        figures = expected["phases"][phase["name"]]
        names = (("compute_us", "compute"), ("communication_us", "comm"), ("exposed_us", "exposed"))
        pairs += [(phase[ours], figures[theirs]) for ours, theirs in names]
    chunks = expected.get("chunks", expected["overlap"])
    pairs += [(device["chunks"]["pair_overlap"], chunks["factor"]), (device["chunks"]["perfect_overlap"], chunks["bound"])]
    if "chunks" in expected:
        classes = expected["compute_classes"]
        pairs += [(device["kinds"][kind]["us"], classes[kind]["union"]) for kind in ("gemm", "grouped_gemm", "attention")]
        for part in ("F", "I", "W"):
            own = device["chunks"][part]
            pairs += [(own["compute_us"], chunks[part]["compute"]), (own["communication_us"], chunks[part]["comm"])]
    return pairs


def measure_invariance(given: argparse.Namespace) -> None:
    """Print whether figures stay when a trace is changed in ways that must not matter."""
    text = gzip.decompress(PUBLISHED[0].read_bytes()).decode()
    before = _strip(_analyze(PUBLISHED[0]))
    with tempfile.TemporaryDirectory() as folder:
        for change in CHANGES:
            document = json.loads(text)
            change(document["traceEvents"])
            path = Path(folder) / "changed.json"
            path.write_text(json.dumps(document))
            print(f"{change.__name__}: {'the same' if _strip(_analyze(path)) == before else 'OTHER FIGURES'}")


def measure_cost(given: argparse.Namespace) -> None:
    """Print processor seconds and memory of a large trace, plain and gzipped."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("large.json", "large.json.gz"):
            path = Path(folder) / name
            size = write_large(path, given.gigabytes * GIGABYTE)
            before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            command = [sys.executable, "-c", ANALYZE, "analyze", str(path), "--json"]
            peak = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            gigabytes = size / GIGABYTE
            print(
                f"{name}: {gigabytes:.2f} GB of JSON, {seconds / gigabytes:.1f} s of the processor and "
                f"{int(peak) * 1024 / 1e9 / gigabytes:.2f} GB of memory a GB ({time.monotonic() - begun:.1f} s)"
            )
            path.unlink()


def measure_hta(given: argparse.Namespace) -> None:
    """Print what HolisticTraceAnalysis takes for the same trace, by the interpreter of ``--hta``, which has it."""
    if given.hta is None:
        print("--hta PYTHON names no interpreter that has HolisticTraceAnalysis: not measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_large(Path(folder) / "rank0.json.gz", given.gigabytes * GIGABYTE)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([given.hta, "-c", HTA, folder], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        print(f"HTA ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}")
        return
    seconds, gigabytes = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, size / GIGABYTE
    peak, hidden = done.stdout.split()[-2:]
    print(
        f"HTA: {gigabytes:.2f} GB of JSON, {seconds / gigabytes:.1f} s of the processor and "
        f"{int(peak) * 1024 / 1e9 / gigabytes:.2f} GB of memory a GB; it finds {hidden} % of communication hidden"
    )


def measure_prediction(given: argparse.Namespace) -> None:
    """Print how far steps that are simulated from a profile's costs are from the profiled ones, on stages that sleep.

    A step is predicted from its own costs. The first profiled step, in which the profiler starts, is left out.
    """
    for name in ("zbv", "dualpipev"):
        with tempfile.TemporaryDirectory() as folder:
            words = f"--schedule {name} --microbatches {MICROBATCHES} --milliseconds 20 --out {folder}".split()
            words += f"--steps {PROFILED[1]} --first {PROFILED[0]}".split()
            start_ranks(RANKS, [sys.executable, "-W", "ignore", "-m", "benchmarks.profile_rank", *words], Path(folder))
            steps = _read_steps(Path(folder))
        table, found = build(name, RANKS, MICROBATCHES), []
        for number in range(PROFILED[0] + 1, PROFILED[1] + 1):
            spans = steps[number]
            costs = estimate_spans(spans, "", 1e3)
            predicted = simulate(table, Costs(costs["f"], costs["i"], costs["w"], costs["p2p"], costs["overlap"])).makespan
            measured = 1000 * (max(span.end for span in spans) - min(span.start for span in spans))
            found.append((predicted / measured - 1, predicted, measured))
        ratio, predicted, measured = sorted(found)[len(found) // 2]
        all_of_them = ", ".join(f"{100 * ratio:+.1f} %" for ratio, _, _ in found)
        print(
            f"{name}: {predicted:.1f} ms from costs, {measured:.1f} ms measured: {100 * ratio:+.1f} % in the median step of "
            f"{len(found)} ({all_of_them})"
        )


def _read_steps(folder: Path) -> dict[int, list[Span]]:
    """Return the actions of each profiled step of all ranks, in seconds."""
    steps: dict[int, list[Span]] = {}
    for path in sorted(folder.glob("profile-rank*.json.gz")):
        trace = read_kineto(path)
        ranges = trace.ranges
        for name, start, end in zip(ranges.name.tolist(), ranges.start.tolist(), ranges.end.tolist(), strict=True):
            if (note := read_annotation(trace.names[name])) is not None:
                span = Span(note.rank, note.action, (start + trace.base) / 1e9, (end + trace.base) / 1e9)
                steps.setdefault(note.step, []).append(span)
    return steps


def write_large(path: Path, size: float) -> int:
    """Write the published trace again and again, each time later, to about ``size`` bytes; return the bytes unpacked."""
    raw = gzip.decompress(PUBLISHED[0].read_bytes())
    begin, end = raw.index(b"[", raw.index(b'"traceEvents"')) + 1, raw.rindex(b"]")
    body, total = raw[begin:end].strip(), 0
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        total += file.write(raw[:begin])
        for number in range(max(1, round(size / len(body)))):

            def shift(match: re.Match[bytes], number: int = number) -> bytes:
                if match[1]:
                    return match[1] + str(int(match[2]) + number * SHIFT).encode()
                return match[3] + str(int(match[4]) + number * CORRELATIONS).encode()

            total += file.write((b",\n" if number else b"") + NUMBERS.sub(shift, body))
        total += file.write(raw[end:])
    return total


def _analyze(path: Path) -> list[dict[str, Any]]:
    return [describe_device(device) for device in analyze_trace(read_trace(path))]


def _strip(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for device in devices:
        del device["file"], device["same_stream_overlaps"]
        for phase in device["phases"]:
            del phase["waited_for"]
    return devices


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "agreement": measure_agreement,
    "invariance": measure_invariance,
    "cost": measure_cost,
    "hta": measure_hta,
    "prediction": measure_prediction,
}

if __name__ == "__main__":
    main()
