"""What a model chunk's forward, input gradient and weight gradient cost, from phases whose names end in (F), (B) or (W)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from counterflow.analysis.overlap import Device
from counterflow.analysis.transfers import measure_transfer
from counterflow.errors import TraceError
from counterflow.schedule.actions import PAIR
from counterflow.schedule.costs import LEAST_OVERLAP, MOST_OVERLAP
from counterflow.schedule.timeline import Span

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
    """Return a costs file's content: of actions, their means; of kernels, what their phases took."""
    if devices[0].trace.timeline is None:
        return estimate_costs(devices, source)
    form, pipeline = devices[0].trace.form, devices[0].trace.pipeline
    timelines = [d.trace.timeline for d in devices if d.trace.timeline is not None and d.trace.pipeline == pipeline]
    spans = [span for timeline in timelines for span in timeline.spans] if form == "host" else list(timelines[0].spans)
    return estimate_spans(spans, source, 1.0 if form == "timeline" else 1e3)


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


def estimate_spans(spans: Sequence[Span], source: str, scale: float) -> dict[str, Any]:
    """Return a costs file's content from actions that took so many milliseconds a unit: the mean of each kind on each stage.

    All actions count, so that at their costs they take as long together as they did: a median, or a mean without outliers,
    would leave out what held them up. For the same reason an I and a W are longer or shorter by one factor where whole B's of
    their stage ran too, and pairs take a share of the sum of all their parts.

    Where a stage has no I, its whole B counts as one, with a W of 0. A stage that ran in pairs alone has the mean of the others.
    ``p2p`` is how long the ranks that wait for a message find it under way, where all have one clock.
    """
    times: dict[tuple[str, int], list[float]] = {}
    for span in spans:
        times.setdefault((span.action.kind, span.action.stage), []).append((span.end - span.start) * scale)
    stages = range(1 + max(single.stage for span in spans for single in span.action.singles()))
    means = {key: sum(values) / len(values) for key, values in times.items() if key[0] == "F"}
    for stage in stages:
        for kind, value in zip("IW", _split_backward(*(times.get((kind, stage), []) for kind in "IWB")), strict=True):
            means |= {} if value is None else {(kind, stage): value}
    costs: dict[str, Any] = {"unit": "ms"}
    for key, kind in (("f", "F"), ("i", "I"), ("w", "W")):
        known = [value for (other, _), value in means.items() if other == kind]
        rest = sum(known) / len(known) if known else 0.0
        costs[key] = [round(means.get((kind, stage), rest), 6) for stage in stages]
    overlap = min(MOST_OVERLAP, max(LEAST_OVERLAP, _measure_pairs(spans, costs, scale)))
    p2p = round(max(0.0, measure_transfer(spans)) * scale, 6)
    return costs | {"p2p": p2p, "overlap": round(overlap, 6), "reduce": 0.0, "source": source}


def _split_backward(i: list[float], w: list[float], b: list[float]) -> tuple[float | None, float | None]:
    """Return the costs of a stage's I and W, from the times of its I's, W's and whole B's; None where none tells."""
    if not i:
        return (sum(b) / len(b), 0.0) if b else (None, sum(w) / len(w) if w else None)
    mean_i, mean_w = sum(i) / len(i), sum(w) / len(w) if w else 0.0
    expected = sum(i) + sum(w) + len(b) * (mean_i + mean_w)
    factor = (sum(i) + sum(w) + sum(b)) / expected if expected else 1.0
    return mean_i * factor, mean_w * factor


def _measure_pairs(spans: Sequence[Span], costs: dict[str, Any], scale: float) -> float:
    """Return the time of all pairs over the sum of their parts' costs; 1 without pairs."""
    together = parts = 0.0
    for span in spans:
        if span.action.kind == PAIR:
            forward, back = (part.stage for part in span.action.parts)
            together += (span.end - span.start) * scale
            parts += costs["f"][forward] + costs["i"][back] + costs["w"][back]
    return together / parts if parts else 1.0


def _average(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)
