"""What would gain how much: the window again under one assumption at a time, the largest gain first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from counterflow.analysis.chunks import find_costs, sum_parts
from counterflow.analysis.classes import IS_COMMUNICATION, KINDS, WAITING
from counterflow.analysis.cluster import Rank
from counterflow.analysis.intervals import unite
from counterflow.analysis.overlap import Device
from counterflow.schedule import FAMILIES, Costs, Family, build, simulate
from counterflow.schedule.families.dualpipev import DUALPIPEV
from counterflow.schedule.families.one_f_one_b import ONE_F_ONE_B
from counterflow.schedule.table import ScheduleTable

# The pipeline that schedules are compared on where a trace does not say how large its own is.
RANKS, MICROBATCHES = 8, 32
BASE, OVERLAPPING = ONE_F_ONE_B.name, DUALPIPEV.name


@dataclass(frozen=True)
class Gain:
    """What one change would save of a window, in nanoseconds; gains overlap, so they do not add up."""

    change: str
    time: int
    window: int
    assumption: str
    hint: str = ""


def list_gains(device: Device) -> list[Gain]:
    """Return what a device's own kernels tell, the largest gain first."""
    compute, communication = device.compute.length, device.communication.length
    gains = [
        Gain(
            "all communication hidden",
            compute + device.exposed - max(compute, communication),
            device.window,
            "each exposed kernel finds computation to run beside, and kernels share the device without slowing down",
            f"--cf-schedule {OVERLAPPING} --cf-overlap",
        ),
        Gain(
            "no waiting for peers in notify kernels",
            _measure_exposed_waiting(device),
            device.window,
            "all ranks arrive at once; what runs beside such a kernel hides it already",
            "--cf-eplb",
        ),
        Gain(
            "no idle time",
            device.idle,
            device.window,
            "kernels follow each other without a gap, as from CUDA graphs or a host that runs ahead",
        ),
    ]
    return sorted((gain for gain in gains if gain.time > 0), key=lambda gain: -gain.time)


def _measure_exposed_waiting(device: Device) -> int:
    """Return the time in which waiting kernels run and nothing else does."""
    start, end = device.trace.work.start[device.rows], device.trace.work.end[device.rows]
    waits = np.isin(device.kind_of, [KINDS.index(kind) for kind in WAITING])
    others = IS_COMMUNICATION[device.kind_of] & ~waits
    computing = unite(np.concatenate([device.compute.starts, start[others]]), np.concatenate([device.compute.ends, end[others]]))
    union = unite(start[waits], end[waits])
    return union.length - union.intersect(computing)


def list_cluster_gains(ranks: Sequence[Rank]) -> list[Gain]:
    """Return what several ranks side by side tell, the largest gain first: means over the ranks."""
    window = max(rank.device.window for rank in ranks)
    waits = [rank.exposed_waiting for rank in ranks if rank.exposed_waiting is not None]
    experts = [rank.experts for rank in ranks]
    gains = [
        Gain(
            "no stragglers",
            sum(waits) // len(waits) if waits else 0,
            window,
            "the n-th collective of a kind is one operation on all ranks, and no rank comes late to it",
        ),
        Gain(
            "balanced experts",
            max(experts) - sum(experts) // len(experts),
            window,
            "each rank's grouped products take the mean rank's time, and the slowest rank holds the others up",
            "--cf-eplb",
        ),
    ]
    return sorted((gain for gain in gains if gain.time > 0), key=lambda gain: -gain.time)


def compare_schedules(devices: Sequence[Device]) -> list[tuple[str, float]]:
    """Return schedules under the trace's costs with the milliseconds of a step, fastest first; none where costs are unknown."""
    devices = [device for device in devices if {"F", "I"} <= set(sum_parts(device))]
    if not devices:
        return []
    given = {key: _average(value) for key, value in find_costs(devices, "").items() if key in ("f", "i", "w", "overlap")}
    steps = []
    for family in FAMILIES.values():
        # Of two replicas a table's step is that of twice the micro-batches.
        for options in _list_options(family) if family.replicas == 1 else ():
            table = build(family.name, RANKS, MICROBATCHES, **options)
            title = f"{family.name} ep-overlap" if options else family.name
            steps.append((title, simulate(table, _scale_costs(given, table)).makespan))
    return sorted(steps, key=lambda step: step[1])


def _average(value: float | Sequence[float]) -> float:
    return sum(value) / len(value) if isinstance(value, Sequence) else value


def _list_options(family: Family) -> Iterator[dict[str, bool]]:
    yield {}
    if "ep_overlap" in family.options:
        yield {"ep_overlap": True}


def _scale_costs(given: dict[str, float], table: ScheduleTable) -> Costs:
    """Return a table's costs where a rank's two chunks together take twice what is given, however many it has."""
    share = table.layout.chunk_share / 0.5
    f, i, w = (given[key] * share for key in ("f", "i", "w"))
    return Costs(f, i, w, overlap=given["overlap"])


def name_schedule_gain(steps: Sequence[tuple[str, float]], window: int) -> Gain | None:
    """Return what the fastest schedule gains over one without overlap, as a share of the window."""
    times = dict(steps)
    if BASE not in times:
        return None
    best, time = steps[0]
    return Gain(
        f"schedule {best} instead of {BASE}",
        round(window * (1 - time / times[BASE])),
        window,
        f"{RANKS} pipeline ranks, {MICROBATCHES} micro-batches, two chunks a rank, each at the costs of this window; "
        f"{time:.0f} ms a step instead of {times[BASE]:.0f}",
        f"--cf-schedule {best.split()[0]}",
    )


def describe_gain(gain: Gain) -> dict[str, object]:
    """Return a gain as ``--json`` prints it."""
    return {
        "change": gain.change,
        "gain_us": round(gain.time / 1000, 3),
        "gain_of_window": round(gain.time / gain.window, 6) if gain.window else 0.0,
        "assumption": gain.assumption,
        "flags": gain.hint,
    }
