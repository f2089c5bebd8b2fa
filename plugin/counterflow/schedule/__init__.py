"""Schedules as data; no torch. See docs/architecture.md."""

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, pair, parse_action
from counterflow.schedule.families import FAMILIES, build, build_forward_only
from counterflow.schedule.layouts import Layout, lay_looped, lay_straight, lay_v
from counterflow.schedule.table import ScheduleTable, from_csv, read_csv, to_csv
from counterflow.schedule.timeline import Span, Timeline, dump_record, load_record
from counterflow.schedule.validation import validate

__all__ = [
    "FAMILIES",
    "Action",
    "Layout",
    "ScheduleError",
    "ScheduleTable",
    "Span",
    "Timeline",
    "build",
    "build_forward_only",
    "dump_record",
    "from_csv",
    "lay_looped",
    "lay_straight",
    "lay_v",
    "load_record",
    "pair",
    "parse_action",
    "read_csv",
    "to_csv",
    "validate",
]
