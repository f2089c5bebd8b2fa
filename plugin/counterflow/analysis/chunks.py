"""What a model chunk's forward, input gradient and weight gradient cost, from phases whose names end in (F), (B) or (W)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from counterflow.analysis.overlap import Device
from counterflow.errors import TraceError
from counterflow.schedule import Timeline, from_csv
from counterflow.schedule.comparison import estimate_costs as estimate_recorded
from counterflow.schedule.costs import LEAST_OVERLAP, MOST_OVERLAP

SUFFIX = re.compile(r".*\(([FBW])\)")
# A phase's suffix, and what the chunk's part is called: a (B) beside (W)'s is the input gradient alone.
PARTS = {"F": "F", "B": "I", "W": "W"}
MILLISECOND = 1e6


@dataclass(frozen=True)
class Part:
    """Time of one part of a chunk, summed over its phases, in nanoseconds."""

    compute: int
    communication: int

    @property
    def time(self) -> int:
        """Both, one after the other."""
        return self.compute + self.communication


def find_part(phase: str) -> str | None:
    """Return F, I or W for a phase of a model chunk; None for another."""
    match = SUFFIX.fullmatch(phase)
    return PARTS[match[1]] if match else None


def sum_parts(device: Device) -> dict[str, Part]:
    """Return the parts that the device's phases name; empty where none does."""
    sums: dict[str, list[int]] = {}
    for phase in device.phases:
        if (part := find_part(phase.name)) is not None:
            total = sums.setdefault(part, [0, 0])
            total[0] += phase.compute
            total[1] += phase.communication
    return {part: Part(*sums[part]) for part in PARTS.values() if part in sums}


def measure_overlap(device: Device) -> tuple[float, float]:
    """Return the pair overlap factor, and what it would be if all that can be hidden were: over the sum of the parts.

    Without parts the sum is that of all computation and all communication.
    """
    compute, communication = device.compute.length, device.communication.length
    serial = sum(part.time for part in sum_parts(device).values()) or compute + communication
    return (device.window / serial, max(compute, communication) / serial) if serial else (1.0, 1.0)


def find_costs(devices: Sequence[Device], source: str) -> dict[str, Any]:
    """Return a costs file's content, from a timeline where the devices are ranks of one, else from their phases."""
    trace = devices[0].trace
    if trace.timeline is not None:
        return estimate_record_costs(trace.timeline, source, 1.0 if trace.form == "record" else 1e-3)
    return estimate_costs(devices, source)


def estimate_costs(devices: Sequence[Device], source: str) -> dict[str, Any]:
    """Return a costs file's content: the mean over devices, in ms per model chunk; a window holds one micro-batch's pair.

    Raises `TraceError` where no phase is named after a part of a chunk.
    """
    found = [(sum_parts(device), *measure_overlap(device)) for device in devices]
    found = [one for one in found if one[0]]
    if not found:
        raise TraceError(
            "no costs are known: no annotation ends in (F), (B) or (W); annotate a chunk's forward NAME(F), its backward NAME(B) "
            "and its weight gradients NAME(W), or record with --cf-profile"
        )
    costs: dict[str, Any] = {"unit": "ms"}
    for key, part in (("f", "F"), ("i", "I"), ("w", "W")):
        costs[key] = _average([parts[part].time / MILLISECOND if part in parts else 0.0 for parts, _, _ in found])
    overlap = _average([min(MOST_OVERLAP, max(LEAST_OVERLAP, factor)) for _, factor, _ in found])
    costs |= {"p2p": 0.0, "overlap": overlap, "reduce": 0.0, "source": source}
    return costs


def estimate_record_costs(timeline: Timeline, source: str, unit: float = 1.0) -> dict[str, Any]:
    """Return a costs file's content from a timeline in so many seconds a unit: the median of each kind on each stage.

    Raises `ScheduleError` where the ranks' actions are no table, or a kind was never recorded alone.
    """
    rows = [[str(span.action) for span in timeline.spans if span.rank == rank] for rank in range(timeline.ranks)]
    table = from_csv("\n".join(map(",".join, rows)), source)
    costs = estimate_recorded(table, timeline)
    scale = unit * 1e3
    values: dict[str, Any] = {"unit": "ms"}
    for key in ("f", "i", "w"):
        values[key] = [round(value * scale, 6) for value in getattr(costs, key)]
    return values | {"p2p": 0.0, "overlap": round(costs.overlap, 6), "reduce": 0.0, "source": source}


def _average(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
