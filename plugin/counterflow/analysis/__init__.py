"""Profiler traces: readers, kernel classes, overlap of computation and communication, phases, costs and what they would gain."""

from counterflow.analysis.classes import Family, classify_name, read_families
from counterflow.analysis.overlap import Device, Phase, Share, analyze_trace
from counterflow.analysis.reading import read_trace, read_traces
from counterflow.analysis.trace import Trace

__all__ = [
    "Device",
    "Family",
    "Phase",
    "Share",
    "Trace",
    "analyze_trace",
    "classify_name",
    "read_families",
    "read_trace",
    "read_traces",
]
