"""Figures as ``analyze --json`` prints them: microseconds, from integer nanoseconds."""

from collections.abc import Sequence
from typing import Any

from counterflow.analysis.chunks import measure_overlap, sum_parts
from counterflow.analysis.cluster import Rank
from counterflow.analysis.overlap import Device
from counterflow.analysis.repetition import find_repetitions
from counterflow.analysis.trace import Label, Trace


def to_us(nanoseconds: float) -> float:
    """Return microseconds with three decimals."""
    return round(nanoseconds / 1000, 3)


def describe_device(device: Device) -> dict[str, Any]:
    """Return one device's figures."""
    return {
        "device": device.label,
        "file": device.trace.path,
        "rank": device.trace.rank,
        "window_us": to_us(device.window),
        "busy_us": to_us(device.busy),
        "idle_us": to_us(device.idle),
        "compute_us": to_us(device.compute.length),
        "communication_us": to_us(device.communication.length),
        "hidden_us": to_us(device.hidden),
        "exposed_us": to_us(device.exposed),
        "kernels": device.kernels,
        "kinds": {
            kind: {"kernels": share.kernels, "us": to_us(share.time), "exposed_us": to_us(share.exposed)}
            for kind, share in device.kinds.items()
        },
        "phases": [
            {
                "name": phase.name,
                "kernels": phase.kernels,
                "compute_us": to_us(phase.compute),
                "communication_us": to_us(phase.communication),
                "exposed_us": to_us(phase.exposed),
                "waited_for": {name: to_us(time) for name, time in _sort(phase.causes)},
            }
            for phase in device.phases
        ],
        "layers": [
            {
                "name": layer.name,
                "part": layer.part,
                "kernels": layer.kernels,
                "compute_us": to_us(layer.compute),
                "communication_us": to_us(layer.communication),
                "exposed_us": to_us(layer.exposed),
            }
            for layer in device.layers
        ],
        "chunks": describe_chunks(device),
        "repetition": [
            {
                "name": unit.name,
                "kernels": unit.kernels,
                "repeats": unit.repeats,
                "starts_us": [to_us(start) for start in unit.starts],
                "us": to_us(unit.length),
                "compute_us": to_us(unit.compute),
                "exposed_us": to_us(unit.exposed),
                "share_of_computation": round(unit.share, 6),
            }
            for unit in find_repetitions(device)
        ],
        "copies": {"kernels": device.copies[0], "us": to_us(device.copies[1])},
        "left_out": dict(device.left_out),
        "unclassified": [{"name": name, "kernels": count, "us": to_us(time)} for name, count, time in device.unclassified],
        "same_stream_overlaps": {"kernels": device.clashes[0], "us": to_us(device.clashes[1])},
        "linked_to_launch": round(device.linked, 6),
    }


def describe_chunks(device: Device) -> dict[str, Any]:
    """Return the parts of a chunk, where phases name them, and how well they overlap."""
    overlap, perfect = measure_overlap(device)
    parts = {
        part: {"compute_us": to_us(times.compute), "communication_us": to_us(times.communication)}
        for part, times in sum_parts(device).items()
    }
    return parts | {"pair_overlap": round(overlap, 6), "perfect_overlap": round(perfect, 6)}


def describe_file(trace: Trace) -> dict[str, Any]:
    """Return what is known of a file; ``read_in_part`` says why where it is cut short."""
    reasons: dict[str, int] = {}
    for (_, reason), count in trace.left_out.items():
        reasons[reason] = reasons.get(reason, 0) + count
    return {
        "file": trace.path,
        "format": trace.form,
        "rank": trace.rank,
        "world_size": trace.world_size,
        "events": trace.events,
        "devices": _list_labels(trace),
        "left_out": reasons,
        "truncated": trace.cut is not None,
        "read_in_part": trace.cut,
    }


def _list_labels(trace: Trace) -> list[Label]:
    return list(trace.devices)


def _sort(causes: Any) -> Sequence[tuple[str, int]]:
    return sorted(causes.items(), key=lambda item: (-item[1], item[0]))


def describe_rank(rank: Rank) -> dict[str, Any]:
    """Return a rank among others; waiting is null where kernels of several ranks cannot be matched."""
    return {
        "rank": rank.device.trace.rank,
        "device": rank.device.label,
        "file": rank.device.trace.path,
        "window_us": to_us(rank.device.window),
        "compute_us": to_us(rank.device.compute.length),
        "exposed_us": to_us(rank.device.exposed),
        "waiting_us": None if rank.waiting is None else to_us(rank.waiting),
        "exposed_waiting_us": None if rank.exposed_waiting is None else to_us(rank.exposed_waiting),
        "bubble": round(rank.bubble, 6),
        "grouped_gemm_us": to_us(rank.experts),
    }
