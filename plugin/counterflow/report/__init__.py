"""Schedules drawn: an interactive page, a picture for papers, a trace for Perfetto, and lines for a terminal; no torch."""

from counterflow.report.differences import describe_differences, write_differences
from counterflow.report.page import render_html
from counterflow.report.picture import Picture
from counterflow.report.svg import render_svg
from counterflow.report.text import render_text
from counterflow.report.trace import render_trace

__all__ = [
    "Picture",
    "describe_differences",
    "render_html",
    "render_svg",
    "render_text",
    "render_trace",
    "write_differences",
]
