"""What would gain how much: the window again under one assumption at a time, the largest gain first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from counterflow.analysis.alternatives import Alternatives
from counterflow.analysis.classes import IS_COMMUNICATION, KINDS, WAITING
from counterflow.analysis.cluster import Rank
from counterflow.analysis.intervals import unite
from counterflow.analysis.overlap import Device
from counterflow.schedule.families.dualpipev import DUALPIPEV

OVERLAPPING = DUALPIPEV.name


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
    return rank_gains(gains)


def rank_gains(gains: Iterable[Gain]) -> list[Gain]:
    """Return what gains anything, the largest first."""
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
            "the n-th collective of a kind is one operation on the ranks that run equally many, and no rank comes late to it",
        ),
        Gain(
            "balanced experts",
            max(experts) - sum(experts) // len(experts),
            window,
            "each rank's grouped products take the mean rank's time, and the slowest rank holds the others up",
            "--cf-eplb",
        ),
    ]
    return rank_gains(gains)


def name_schedule_gain(found: Alternatives | None, window: int) -> Gain | None:
    """Return what the fastest schedule gains over the run's own, or over what the run may be on, as a share of the window."""
    if found is None or not found.steps[0].step < found.base.step:
        return None
    best, base = found.steps[0], found.base
    return Gain(
        f"schedule {best.title} instead of {base.title}",
        round(window * (1 - best.step / base.step)),
        window,
        ("" if found.is_known else f"if the run is on {base.title} now; ")
        + f"{found.ranks} pipeline ranks, {found.microbatches} micro-batches, chunks at the costs of this window"
        + (f", pairs that hide all they can ({found.assumed:.2f} of their parts)" if found.assumed and best.has_pairs else "")
        + f"; {best.step:.0f} ms a step instead of {base.step:.0f}",
        best.flags,
    )


def list_unknown(ranks: Sequence[Rank], *, knows_schedules: bool) -> list[str]:
    """Return what cannot be told of these files, each with what would tell it."""
    unknown = []
    if len(ranks) == 1:
        unknown.append("no stragglers, balanced experts: give the traces of several ranks of the step")
    elif all(rank.waiting is None for rank in ranks):
        unknown.append("no stragglers: no two of these ranks run the same collectives equally often")
    if not knows_schedules:
        unknown.append("another schedule: give all ranks of a pipeline by --cf-profile, or name phases NAME(F), NAME(B), NAME(W)")
    return unknown


def describe_gain(gain: Gain) -> dict[str, object]:
    """Return a gain as ``--json`` prints it."""
    return {
        "change": gain.change,
        "gain_us": round(gain.time / 1000, 3),
        "gain_of_window": round(gain.time / gain.window, 6) if gain.window else 0.0,
        "assumption": gain.assumption,
        "flags": gain.hint,
    }
