"""The schedules that can be built by name, a module each, with its source, formulas and picture."""

import inspect
from collections.abc import Callable
from typing import Any

from counterflow.bounds import show, take_whole
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

__all__ = ["FAMILIES", "build", "build_forward_only", "require_size"]

# Ranks x micro-batches x chunks: a table of so many takes gigabytes; more is a mistyped number.
MAX_RUNS = 2**22

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
    if not isinstance(name, str) or name not in FAMILIES:
        raise ScheduleError(f"schedule '{show(name)}' is not known; allowed: {', '.join(FAMILIES)}")
    allowed = [option for option in inspect.signature(FAMILIES[name]).parameters if option not in ("ranks", "microbatches")]
    if strange := set(options) - set(allowed):
        takes = f"allowed: {', '.join(allowed)}" if allowed else "it has none"
        raise ScheduleError(f"{name}: option {min(strange)!r} given; {takes}")
    require_size(ranks, microbatches, options.get("vpp", 2))
    return FAMILIES[name](ranks, microbatches, **options)


def require_size(ranks: int, microbatches: int, chunks: int, most: int = MAX_RUNS) -> None:
    """Raise `ScheduleError` for what is no size of a schedule: whole numbers, 1 or more, and not too many runs of a chunk."""
    runs = 1
    for name, given in (("ranks", ranks), ("micro-batches", microbatches), ("chunks", chunks)):
        runs *= take_whole(given, name, 1, most, ScheduleError)
    if runs > most:
        raise ScheduleError(
            f"{ranks} ranks x {microbatches} micro-batches x {chunks} chunks given, {runs:,} runs of a chunk; "
            f"allowed: {most:,} at most, so give fewer of them"
        )
