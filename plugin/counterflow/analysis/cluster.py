"""Several ranks side by side: files that belong together, and waiting told from transfer by kernels that all ranks run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from counterflow.analysis.classes import KINDS
from counterflow.analysis.intervals import unite
from counterflow.analysis.overlap import Device
from counterflow.analysis.trace import Trace
from counterflow.arrays import Array
from counterflow.errors import TraceError

# What no rank leaves before the last has come. Messages between two ranks are not among them.
TOGETHER = (
    "ep_dispatch", "ep_combine", "ep_notify", "all_reduce", "all_gather", "reduce_scatter", "all_to_all",
)  # fmt: skip
# Clocks that count from 1970; others, as from a host's start, cannot be compared between hosts.
LEAST_EPOCH = 10**18


@dataclass(frozen=True)
class Rank:
    """One device among others: how long it waits for them in kernels that all run, and what of that is exposed; nanoseconds.

    ``waiting`` is None where kernels of several ranks cannot be matched. ``bubble`` is the share of the window in which it runs
    nothing, or nothing but an exposed message of the pipeline. ``experts`` is the time of its grouped products.
    """

    device: Device
    waiting: int | None
    exposed_waiting: int | None
    bubble: float
    experts: int


def check_files(traces: Sequence[Trace]) -> None:
    """Raise `TraceError` for files that cannot be ranks of one run: one given twice, or steps that do not match."""
    for number, trace in enumerate(traces):
        for other in traces[:number]:
            if _is_same(trace, other):
                rank = f" (rank {trace.rank})" if trace.rank is not None else ""
                raise TraceError(f"{other.path} and {trace.path} hold the same rank{rank}; give one file per rank")
            if trace.steps and other.steps and not trace.steps & other.steps:
                raise TraceError(
                    f"{other.path} holds step {_list_steps(other)}, {trace.path} step {_list_steps(trace)}; "
                    "give ranks of the same step, or compare steps by --against"
                )
            _check_times(other, trace)


def _is_same(trace: Trace, other: Trace) -> bool:
    if trace.rank is not None and other.rank is not None:
        return trace.rank == other.rank
    one, two = trace.work, other.work
    return len(one.start) == len(two.start) and bool((one.start == two.start).all() and (one.end == two.end).all())


def _check_times(one: Trace, two: Trace) -> None:
    (begin, end), (other_begin, other_end) = ((t.work.start.min() + t.base, t.work.end.max() + t.base) for t in (one, two))
    if min(begin, other_begin) >= LEAST_EPOCH and (other_begin > end or begin > other_end):
        apart = max(other_begin - end, begin - other_end) / 1e9
        raise TraceError(
            f"{one.path} and {two.path} are {apart:.3g} s apart and share no time; give ranks of the same step, or compare steps "
            "by --against"
        )


def _list_steps(trace: Trace) -> str:
    return ", ".join(sorted(trace.steps, key=int)[:4])


def compare_ranks(devices: Sequence[Device]) -> list[Rank]:
    """Return the devices side by side, waiting told from transfer where their kernels can be matched."""
    waits = _find_waits(devices)
    ranks = []
    # Ranks of one timeline share a clock, and its makespan.
    makespan = max(device.last for device in devices) - min(device.first for device in devices)
    for number, device in enumerate(devices):
        messages = device.kinds.get("send_recv")
        window = device.window if device.trace.timeline is None else makespan
        idle = window - device.busy + (messages.exposed if messages else 0)
        experts = device.kinds.get("grouped_gemm")
        wait = waits[number]
        waiting, exposed = _measure_waits(device, *wait) if wait is not None else (None, None)
        ranks.append(Rank(device, waiting, exposed, idle / window if window else 0.0, experts.time if experts else 0))
    return ranks


def _measure_waits(device: Device, starts: Array, ends: Array) -> tuple[int, int]:
    union = unite(starts, ends)
    return union.length, union.length - union.intersect(device.compute)


def measure_waiting(devices: Sequence[Device], kinds: Sequence[str]) -> list[int | None]:
    """Return for how long each device waits for others in kernels of some kinds, exposed; None where none can be matched."""
    return [
        None if wait is None else _measure_waits(device, *wait)[1]
        for device, wait in zip(devices, _find_waits(devices, kinds), strict=True)
    ]


def _find_waits(devices: Sequence[Device], kinds: Sequence[str] = TOGETHER) -> list[tuple[Array, Array] | None]:
    """Return each device's waits as starts and ends; None where nothing is matched.

    The n-th kernel of a kind (and process group, and pipeline rank, where known) is the same operation on the ranks that ran
    equally many. The shortest of them did not wait: the others waited for what they took longer, at their start. This needs no
    common clock.
    """
    found: list[list[tuple[Array, Array]]] = [[] for _ in devices]
    members: dict[tuple[str, str, int | None, int], dict[int, tuple[Array, Array]]] = {}
    for number, device in enumerate(devices):
        for key, spans in _sort_operations(device, kinds).items():
            members.setdefault((*key, len(spans[0])), {})[number] = spans
    for alike in members.values():
        if len(alike) > 1:
            shortest = np.min([ends - starts for starts, ends in alike.values()], axis=0)
            for number, (starts, ends) in alike.items():
                found[number].append((starts, ends - shortest))
    return [
        (np.concatenate([starts for starts, _ in waits]), np.concatenate([ends for _, ends in waits])) if waits else None
        for waits in found
    ]


def _sort_operations(device: Device, kinds: Sequence[str]) -> dict[tuple[str, str, int | None], tuple[Array, Array]]:
    """Return starts and ends of the kernels that all ranks run, in order, by kind, process group and pipeline rank."""
    work, trace = device.trace.work, device.trace
    rank = find_pipeline_rank(trace)
    table = {}
    for kind in kinds:
        rows = device.rows[device.kind_of == KINDS.index(kind)]
        for group in np.unique(work.group[rows]).tolist():
            own = rows[work.group[rows] == group]
            own = own[np.argsort(work.start[own], kind="stable")]
            table[kind, trace.groups[group] if group >= 0 else "", rank] = work.start[own], work.end[own]
    return table


def find_pipeline_rank(trace: Trace) -> int | None:
    """Return the pipeline rank of a trace with actions: other ranks run other stages, and so other collectives."""
    if trace.timeline is None:
        return None
    return trace.timeline.spans[0].rank if trace.form == "host" else trace.rank
