"""Profiler traces made for tests: a few kernels with launches, annotations and all that a reader has to put up with."""

import gzip
import importlib.util
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from counterflow.analysis.trace import Launches, Ranges, Trace, Work

SHARED = Path(__file__).resolve().parents[3] / "shared"
ORACLE = SHARED / "tools" / "trace_oracle.py"
PUBLISHED = (SHARED / "data" / "deepseek_train_trace.json.gz", *sorted((SHARED / "data" / "traces").glob("*.*z")))
EXPORTS = tuple(sorted((SHARED / "data" / "traces").glob("*.sqlite")))

Event = dict[str, Any]
# Microseconds since 1970, as of the profiler.
EPOCH = 1_740_461_679_000_000
COMPUTE = (
    "void cutlass::device_kernel<dpsk::grouped_gemm::cuda::fp8_ptp128c::GemmKernel>(Params)",
    "void flash::flash_fwd_kernel<Traits<128>, true>(flash::Params)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, Array<char*, 1> >(int, float)",
    "void deep_gemm::m_grouped_gemm<7168u>(deep_ep::internode::SourceMeta*)",
)
COMMUNICATE = (
    "void deep_ep::internode::dispatch<false, 8>(int4*, nvshmem_team_t)",
    "void deep_ep::internode::combine<false, 8>(int4*)",
    "void deep_ep::internode::cached_notify<false>(int)",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*, unsigned long)",
)


def load_oracle() -> Any:
    """Return the independent analyser of the project's shared tools; skips where it is absent."""
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is not there")
    spec = importlib.util.spec_from_file_location("trace_oracle", ORACLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_kernel(name: str, start: float | str, length: float | str, stream: int = 7, device: int = 0, **args: Any) -> Event:
    """Return a kernel; times in microseconds, as they are to be written."""
    args = {"device": device, "stream": stream, **args}
    return {"ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": stream, "ts": start, "dur": length, "args": args}


def make_launch(correlation: int, start: float, thread: int = 1) -> Event:
    """Return the call that launched the kernel of that correlation."""
    args = {"correlation": correlation}
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "pid": 9,
        "tid": thread,
        "ts": start,
        "dur": 1,
        "args": args,
    }


def make_range(name: str, start: float, length: float, thread: int = 1) -> Event:
    """Return an annotation on a thread of the host."""
    return {"ph": "X", "cat": "user_annotation", "name": name, "pid": 9, "tid": thread, "ts": start, "dur": length, "args": {}}


def make_events(seed: int, kernels: int = 60, devices: Sequence[int] = (0,), start: int = EPOCH) -> list[Event]:
    """Return kernels on two or three streams of each device, computing and communicating, launched in nested annotations."""
    random, events = Random(seed), []
    for device in devices:
        time = {7: start, 23: start, 24: start}
        for number in range(kernels):
            stream = random.choice(list(time))
            begin = time[stream] + random.choice((0, 0, 3, 250)) + 0.125
            length = random.choice((1, 40.5, 700))
            time[stream] = int(begin + length) + 1
            name = random.choice(COMPUTE if stream == 7 else (*COMMUNICATE, *COMPUTE[2:3]))
            correlation = 1000 * device + number + 1
            events.append(make_kernel(name, begin, length, stream, device, correlation=correlation))
            # Backward kernels are launched by another thread than the annotated one.
            events.append(make_launch(correlation, start + 20 * number, random.choice((1, 1, 2))))
    for number, name in enumerate(("mlp(F)", "dispatch(F)", "mlp(B)", "mlp(W)")):
        events.append(make_range(name, start + 300 * number, 290))
        events.append(make_range(f"{name} inner", start + 300 * number + 100, 60))
    events += [make_range("ProfilerStep#5", start, 900), make_range("nccl:all_reduce", start, 5000)]
    events.append(
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "pid": 0, "tid": 7, "ts": start + 5, "dur": 30, "args": {}}
    )
    events.append({"ph": "i", "name": "Record Window End", "ts": start, "s": "g"})
    return events


def write_trace(path: Path, events: Iterable[Event], **head: Any) -> Path:
    """Write a trace, gzipped where the name says so."""
    text = json.dumps({"schemaVersion": 1, **head, "traceEvents": list(events), "traceName": path.name})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_export(path: Path, rows: Iterable[tuple[str, int, int, int, int, int]]) -> Path:
    """Write an export of Nsight Systems with kernels: name, start, end (ns), device, stream, correlation."""
    connection = sqlite3.connect(path)
    connection.execute("create table StringIds (id integer primary key, value text)")
    connection.execute(
        "create table CUPTI_ACTIVITY_KIND_KERNEL (start int, end int, deviceId int, streamId int, correlationId int, "
        "globalPid int, demangledName int, shortName int)"
    )
    connection.execute("create table CUPTI_ACTIVITY_KIND_RUNTIME (start int, end int, globalTid int, correlationId int)")
    connection.execute(
        "create table NVTX_EVENTS (start int, end int, eventType int, domainId int, text text, textId int, globalTid int)"
    )
    names: dict[str, int] = {}
    process = 1 << 24
    for name, start, end, device, stream, correlation in rows:
        number = names.setdefault(name, len(names) + 1)
        values = (start, end, device, stream, correlation, process, number, number)
        connection.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (?,?,?,?,?,?,?,?)", values)
        connection.execute(
            "insert into CUPTI_ACTIVITY_KIND_RUNTIME values (?,?,?,?)", (start - 500, start - 400, process + 1, correlation)
        )
    connection.executemany("insert into StringIds values (?,?)", [(number, name) for name, number in names.items()])
    ranges = [
        (0, 2**40, 59, 0, "whole", None, process + 1),
        (0, None, 75, 3, "NCCL", None, None),
        (0, 2**40, 59, 3, "x", None, process),
    ]
    connection.executemany("insert into NVTX_EVENTS values (?,?,?,?,?,?,?)", ranges)
    connection.commit()
    connection.close()
    return path


def make_large_trace(kernels: int) -> Trace:
    """Return a trace of so many kernels on three streams: products of 3 us one after another, transfers now and then."""
    number = np.arange(kernels)
    stream = np.where(number % 10 < 8, 0, number % 10 - 7)
    place = np.where(stream == 0, number - 2 * (number // 10), number // 10)
    start = np.where(stream == 0, 3_200, 32_000) * place
    length = np.where(stream == 0, 3_000, np.where(number % 1000 < 300, 9_000, 2_000))
    name = np.where(stream == 0, number % len(COMPUTE), len(COMPUTE) + number % len(COMMUNICATE))
    nothing, none = np.full(kernels, -1), np.empty(0, np.int64)
    device, what = np.zeros((2, kernels), np.int8)
    work = Work(device, stream, what, name, start, start + length, nothing, nothing, nothing, nothing)
    ranges, launches = Ranges(none, none, none, none, none), Launches(none, none, none, none)
    return Trace("large.json", "made", COMPUTE + COMMUNICATE, (0,), (7, 23, 24), (), (), work, launches, ranges, ranges)
