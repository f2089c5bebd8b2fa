"""Any trace file to columns, by what its first bytes say."""

from dataclasses import replace
from pathlib import Path

from counterflow.analysis.actions import read_record, split_timeline
from counterflow.analysis.blocks import SQLITE, read_start
from counterflow.analysis.host import has_actions, lay_out_host
from counterflow.analysis.kineto import read_kineto
from counterflow.analysis.nsight import read_nsight
from counterflow.analysis.trace import KERNEL, Trace
from counterflow.errors import TraceError

MILLISECOND = 1e6
IN_PART = "was read in part: "
# What --cf-profile calls its files.
PROFILES = "profile-rank*.json.gz"
RECORD = "torch.profiler.profile with ProfilerActivity.CUDA, nsys profile --trace cuda,nvtx, or --cf-profile"


def read_traces(path: Path) -> list[Trace]:
    """Read a profiler trace, or a trace per rank of a record's last step or of a simulated timeline.

    Raises `CounterflowError` that names the file.
    """
    if path.is_dir():
        profiles = sorted(path.glob(PROFILES))
        return [trace for profile in profiles for trace in read_traces(profile)] if profiles else read_record(path)
    trace = _read_file(path)
    if not _has_kernels(trace) and has_actions(trace):
        return [lay_out_host(trace)]
    if trace.timeline is not None and not _has_kernels(trace):
        return split_timeline(trace.timeline, str(path), "timeline", "", MILLISECOND)
    return [_require_kernels(trace)]


def read_trace(path: Path) -> Trace:
    """Read a profiler trace that holds GPU kernels; raises `TraceError` that names the file."""
    return _require_kernels(_read_file(path))


def _read_file(path: Path) -> Trace:
    is_export = read_start(path).startswith(SQLITE)
    try:
        trace = read_nsight(path) if is_export else read_kineto(path)
    except TraceError as error:
        raise TraceError(f"{path} {error}" if str(error).startswith("is ") else f"{path}: {error}") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None
    return replace(trace, cut=f"{path} {IN_PART}{trace.cut}" if trace.cut else None)


def _has_kernels(trace: Trace) -> bool:
    return bool((trace.work.what == KERNEL).any())


def _require_kernels(trace: Trace) -> Trace:
    if not _has_kernels(trace):
        raise TraceError(f"{trace.path} has no GPU kernels: {_describe(trace)}; record with {RECORD}")
    return trace


def _describe(trace: Trace) -> str:
    """Say what a trace without kernels holds."""
    if trace.cut:
        return f"{trace.cut.removeprefix(f'{trace.path} {IN_PART}')}, {trace.events:,} events"
    if not trace.events:
        return "it holds no events"
    held = ", ".join(f"{count:,} of {category}" for category, count in trace.categories.most_common(4))
    left_out = f", {count:,} kernels without times" if (count := sum(trace.left_out.values())) else ""
    return f"it holds {trace.events:,} events ({held or 'others'}){left_out}"
