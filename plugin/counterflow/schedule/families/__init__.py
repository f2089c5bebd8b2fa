"""The schedules that can be built by name, a module each, with its source, formulas and picture."""

import inspect
from collections.abc import Callable
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.schedule.families.dualpipe import build_dualpipe
from counterflow.schedule.families.dualpipev import build_dualpipev
from counterflow.schedule.families.forward_only import build_forward_only
from counterflow.schedule.families.gpipe import build_gpipe
from counterflow.schedule.families.interleaved import build_interleaved
from counterflow.schedule.families.one_f_one_b import build_1f1b
from counterflow.schedule.families.zb_h1 import build_zb_h1
from counterflow.schedule.families.zbv import build_zbv
from counterflow.schedule.table import ScheduleTable

__all__ = ["FAMILIES", "build", "build_forward_only"]

FAMILIES: dict[str, Callable[..., ScheduleTable]] = {
    "gpipe": build_gpipe,
    "1f1b": build_1f1b,
    "interleaved": build_interleaved,
    "zb-h1": build_zb_h1,
    "zbv": build_zbv,
    "dualpipev": build_dualpipev,
    "dualpipe": build_dualpipe,
}


def build(name: str, ranks: int, microbatches: int, **options: Any) -> ScheduleTable:
    """Build a schedule by name (`FAMILIES`); ``interleaved`` takes ``vpp``, ``group`` and ``ep_overlap``.

    Raises `ScheduleError` for an unknown name, a size that the schedule does not allow, or an option it does not have.
    """
    if name not in FAMILIES:
        raise ScheduleError(f"schedule {name!r} is not known; allowed: {', '.join(FAMILIES)}")
    allowed = [option for option in inspect.signature(FAMILIES[name]).parameters if option not in ("ranks", "microbatches")]
    if strange := set(options) - set(allowed):
        takes = f"allowed: {', '.join(allowed)}" if allowed else "it has none"
        raise ScheduleError(f"{name}: option {min(strange)!r} given; {takes}")
    return FAMILIES[name](ranks, microbatches, **options)
