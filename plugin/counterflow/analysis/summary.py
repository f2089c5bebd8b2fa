"""A device's figures in one line."""

from pathlib import Path

from counterflow.analysis.overlap import Device, analyze_trace
from counterflow.analysis.reading import read_traces


def summarize_file(path: Path) -> str:
    """Return the line of a file's first device; raises `CounterflowError` where there is none."""
    return summarize(analyze_trace(read_traces(path)[0])[0])


def summarize(device: Device) -> str:
    """Return window, busy share, computation, communication and what of it is hidden and exposed."""
    figures = [
        f"window {write_ms(device.window)} ms",
        f"busy {write_percent(device.busy, device.window)}",
        f"computation {write_ms(device.compute.length)} ms",
        f"communication {write_ms(device.communication.length)} ms",
    ]
    line = "   ".join(figures)
    if device.communication.length:
        hidden = write_percent(device.hidden, device.communication.length)
        line += f", {hidden} hidden, {write_ms(device.exposed)} ms exposed"
    return line


def write_ms(nanoseconds: float) -> str:
    """Return milliseconds for a reader."""
    milliseconds = nanoseconds / 1e6
    return f"{milliseconds:.1f}" if abs(milliseconds) >= 0.1 or not milliseconds else f"{milliseconds:.3g}"


def write_percent(part: float, whole: float) -> str:
    """Return a share for a reader."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
