"""The interactive page of profiled steps: lanes per device, exposed communication, phases, what would gain how much."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from counterflow.analysis.cluster import Rank
from counterflow.analysis.comparison import Comparison
from counterflow.analysis.gains import Gain
from counterflow.analysis.overlap import Device
from counterflow.analysis.phases import WITHOUT
from counterflow.analysis.summary import write_ms, write_percent
from counterflow.analysis.trace import NONE
from counterflow.arrays import Array
from counterflow.report.filling import fill_page
from counterflow.report.lanes import (
    KERNEL_LEGEND,
    LEGEND,
    MOST_DEVICES,
    NAMES,
    Lane,
    check_size,
    choose_shade,
    find_offsets,
    list_lanes,
)
from counterflow.report.overlap_text import (
    list_causes,
    list_kinds,
    list_layers,
    list_notes,
    list_ranks,
    name_device,
    tabulate,
    write_costs,
    write_repetitions,
)
from counterflow.report.picture import clean_text

MOST_PHASES = 200


@dataclass(frozen=True)
class Findings:
    """What an analysis found: devices with their gains, what is not known, ranks side by side, comparisons, words on files."""

    devices: Sequence[Device]
    gains: Sequence[Sequence[Gain]]
    shared_gains: Sequence[Gain] = ()
    unknown: Sequence[str] = ()
    ranks: Sequence[Rank] = ()
    against: Sequence[Comparison] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def render_findings_html(findings: Findings, title: str) -> str:
    """Return one self-contained page; raises `TraceError` for more kernels than it can show."""
    order = sorted(range(len(findings.devices)), key=lambda number: -findings.devices[number].exposed)
    places = sorted(order[:MOST_DEVICES])
    devices = [findings.devices[place] for place in places]
    check_size(devices, "the page")
    offsets, one_clock = find_offsets(devices)
    notes = [clean_text(note) for note in findings.notes]
    if len(devices) < len(findings.devices):
        notes.append(f"shown are the {MOST_DEVICES} of {len(findings.devices)} devices with most exposed communication")
    if not one_clock:
        notes.append("the files' clocks cannot be compared: each device begins at zero")
    return fill_page(
        "overlap",
        "overlap",
        encode_devices(devices, offsets),
        title=clean_text(title),
        notes=notes,
        devices=[_describe(findings.devices[place], findings.gains[place]) for place in places],
        ranks=list_ranks(findings.ranks),
        unknown=findings.unknown,
        shared=[_describe_gain(gain) for gain in findings.shared_gains],
        against=[table for comparison in findings.against for table in tabulate(comparison)],
        states=LEGEND.items(),
        kernels=KERNEL_LEGEND.items(),
    )


def _describe(device: Device, gains: Sequence[Gain]) -> dict[str, Any]:
    """Return the words and figures of a device's part of the page."""
    return {
        "name": name_device(device),
        "figures": {
            "window": f"{write_ms(device.window)} ms",
            "busy": write_percent(device.busy, device.window),
            "computation": f"{write_ms(device.compute.length)} ms",
            "communication": f"{write_ms(device.communication.length)} ms",
            "hidden": write_percent(device.hidden, device.communication.length),
            "exposed": f"{write_ms(device.exposed)} ms",
        },
        "phases": [
            [clean_text(phase.name), f"{phase.kernels:,}", *map(write_ms, (phase.compute, phase.communication, phase.exposed)),
             list_causes(phase)]
            for phase in device.phases[:MOST_PHASES]
        ],
        "more_phases": max(0, len(device.phases) - MOST_PHASES),
        "layers": list_layers(device) if device.layers else [],
        "kinds": list_kinds(device),
        "costs": " ".join(write_costs(device)),
        "gains": [_describe_gain(gain) for gain in gains],
        "notes": [*write_repetitions(device), *list_notes(device)],
    }  # fmt: skip


def _describe_gain(gain: Gain) -> list[str]:
    return [f"{write_ms(gain.time)} ms", write_percent(gain.time, gain.window), gain.change, gain.assumption, gain.hint]


def encode_devices(devices: Sequence[Device], offsets: Sequence[int]) -> dict[str, Any]:
    """Return what the page's script draws: kernels as packed columns, times in ticks of ``tick`` nanoseconds.

    ``names`` and ``phases`` are texts of all devices, the first of each stands for none.
    """
    total = max(offset + device.window for device, offset in zip(devices, offsets, strict=True))
    tick = max(1, -(-total // (2**32 - 1)))
    names, phases = Texts(""), Texts(WITHOUT)
    return {
        "tick": tick,
        "kinds": NAMES,
        "shades": [choose_shade(kind) for kind in NAMES],
        "devices": [
            {
                "name": name_device(device),
                "begin": offset,
                "length": device.window,
                "lanes": [_encode_lane(device, lane, offset, tick, names, phases) for lane in list_lanes(device)],
            }
            for device, offset in zip(devices, offsets, strict=True)
        ],
        "names": names.list(),
        "phases": phases.list(),
    }


class Texts:
    """Numbers texts, each cleaned once, in the order in which they come."""

    def __init__(self, first: str) -> None:
        self._numbers = {first: 0}

    def number(self, texts: Sequence[str], wanted: Array) -> Array:
        """Return the number of ``texts[n]`` for each n that is wanted; 0 where n is -1."""
        unique, place = np.unique(wanted, return_inverse=True)
        found = [0 if n == NONE else self._numbers.setdefault(clean_text(texts[n]), len(self._numbers)) for n in unique.tolist()]
        return np.array(found, np.int64)[place]

    def list(self) -> list[str]:
        """Return all texts by number."""
        return list(self._numbers)


def _encode_lane(device: Device, lane: Lane, offset: int, tick: int, names: Texts, phases: Texts) -> dict[str, Any]:
    begin, end = (lane.start + offset) // tick, (lane.end + offset) // tick
    known, trace = lane.rows != NONE, device.trace
    name, phase = np.full(len(begin), NONE), np.full(len(begin), NONE)
    name[known], phase[known] = trace.work.name[device.rows[lane.rows[known]]], device.phase_of[lane.rows[known]]
    return {
        "title": lane.title,
        "detail": clean_text(lane.detail),
        "starts": pack_whole(begin),
        "lengths": pack_whole(end - begin),
        "kinds": pack_whole(lane.kinds),
        "names": pack_whole(names.number(trace.names, name)),
        "phases": pack_whole(phases.number(trace.names, phase)),
    }


def pack_whole(values: Array) -> dict[str, Any]:
    """Return whole numbers below 2**32 in as few bytes each as hold the largest, little end first, in base 64."""
    size = next(size for size in (1, 2, 4) if int(values.max(initial=0)) < 256**size)
    return {"bytes": size, "bits": base64.b64encode(values.astype(f"<u{size}").tobytes()).decode()}
