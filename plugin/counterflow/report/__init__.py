"""Schedules, balance replays and records drawn: interactive pages, pictures for papers, traces, lines for a terminal."""

from counterflow.report.differences import describe_differences, write_differences
from counterflow.report.overlap_page import Findings, render_findings_html
from counterflow.report.overlap_svg import render_findings_svg
from counterflow.report.overlap_trace import render_findings_trace
from counterflow.report.page import render_html
from counterflow.report.picture import Picture
from counterflow.report.record import render_record_html, render_record_svg
from counterflow.report.replay import render_replay_html, render_replay_svg
from counterflow.report.svg import render_svg
from counterflow.report.text import render_text
from counterflow.report.trace import render_trace

__all__ = [
    "Findings",
    "Picture",
    "describe_differences",
    "render_findings_html",
    "render_findings_svg",
    "render_findings_trace",
    "render_html",
    "render_record_html",
    "render_record_svg",
    "render_replay_html",
    "render_replay_svg",
    "render_svg",
    "render_text",
    "render_trace",
    "write_differences",
]
