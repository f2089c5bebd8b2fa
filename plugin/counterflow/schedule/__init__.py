"""Schedules as data; no torch. See docs/architecture.md.

`counterflow.schedule.search` and `counterflow.schedule.transport` are imported by their own names: the search loads a compiler.
"""

from counterflow.errors import ScheduleError
from counterflow.schedule.actions import Action, pair, parse_action
from counterflow.schedule.costs import Costs
from counterflow.schedule.families import FAMILIES, Family, build, build_forward_only
from counterflow.schedule.files import from_csv, read_csv, to_csv
from counterflow.schedule.layouts import Layout, lay_bidirectional, lay_looped, lay_passes, lay_straight, lay_v
from counterflow.schedule.reductions import add_reductions
from counterflow.schedule.simulation import simulate
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import Memory, Span, Timeline, Wait, dump_record, load_record
from counterflow.schedule.validation import validate

__all__ = [
    "FAMILIES",
    "Action",
    "Costs",
    "Family",
    "Layout",
    "Memory",
    "ScheduleError",
    "ScheduleTable",
    "Span",
    "Timeline",
    "Wait",
    "add_reductions",
    "build",
    "build_forward_only",
    "dump_record",
    "from_csv",
    "lay_bidirectional",
    "lay_looped",
    "lay_passes",
    "lay_straight",
    "lay_v",
    "load_record",
    "pair",
    "parse_action",
    "read_csv",
    "simulate",
    "to_csv",
    "validate",
]
