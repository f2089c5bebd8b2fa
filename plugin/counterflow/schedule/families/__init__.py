"""The schedules that can be built by name, a module each. `FAMILIES` is all that the rest of the project knows of them."""

from typing import Any

from counterflow.bounds import show, take_whole
from counterflow.errors import ScheduleError
from counterflow.schedule.families.dualpipe import DUALPIPE
from counterflow.schedule.families.dualpipev import DUALPIPEV
from counterflow.schedule.families.family import Family
from counterflow.schedule.families.forward_only import build_forward_only
from counterflow.schedule.families.gpipe import GPIPE
from counterflow.schedule.families.interleaved import INTERLEAVED
from counterflow.schedule.families.one_f_one_b import ONE_F_ONE_B
from counterflow.schedule.families.zb_h1 import ZB_H1
from counterflow.schedule.families.zbv import ZBV
from counterflow.schedule.table import ScheduleTable

__all__ = [
    "FAMILIES",
    "Family",
    "build",
    "build_forward_only",
    "describe_families",
    "list_names",
    "require_size",
]

# Ranks x micro-batches x chunks: a table of so many takes gigabytes; more is a mistyped number.
MAX_RUNS = 2**22

FAMILIES = {family.name: family for family in (GPIPE, ONE_F_ONE_B, INTERLEAVED, ZB_H1, ZBV, DUALPIPEV, DUALPIPE)}


def build(name: str, ranks: int, microbatches: int, **options: Any) -> ScheduleTable:
    """Build a schedule by name (`FAMILIES`), with options of the family (`Family.options`).

    Raises `ScheduleError` for an unknown name, a size that the schedule does not allow, or an option it does not have.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ScheduleError(f"schedule '{show(name)}' is not known; allowed: {', '.join(FAMILIES)}")
    allowed = FAMILIES[name].options
    if strange := set(options) - set(allowed):
        takes = f"allowed: {', '.join(allowed)}" if allowed else "it has none"
        raise ScheduleError(f"{name}: option {min(strange)!r} given; {takes}")
    require_size(ranks, microbatches, options.get("vpp", 2))
    return FAMILIES[name].build(ranks, microbatches, **options)


def require_size(ranks: int, microbatches: int, chunks: int, most: int = MAX_RUNS) -> None:
    """Raise `ScheduleError` for what is no size of a schedule: whole numbers, 1 or more, and not too many runs of a chunk."""
    runs = 1
    for name, size in (("ranks", ranks), ("micro-batches", microbatches), ("chunks", chunks)):
        runs *= take_whole(size, name, 1, most, ScheduleError)
    if runs > most:
        raise ScheduleError(
            f"{ranks} ranks x {microbatches} micro-batches x {chunks} chunks given, {runs:,} runs of a chunk; "
            f"allowed: {most:,} at most, so give fewer of them"
        )


def list_names(layout: str | None = None, *, pairs: bool = False, option: str = "") -> list[str]:
    """Return the names of the families on a layout, that have overlapped pairs, or whose tables take an option."""
    return [
        family.name
        for family in FAMILIES.values()
        if layout in (None, family.layout) and (family.pairs or not pairs) and (not option or option in family.options)
    ]


def describe_families() -> str:
    """Return a table of all families in Markdown, and their pictures."""
    lines = ["| name | layout | sizes | bubble per rank | live activations | source |", "| --- | --- | --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        name = f"`{family.name}`" + (f" ({', '.join(f'`{option}`' for option in family.options)})" if family.options else "")
        cells = (name, family.layout, family.sizes, family.bubble, family.activations, family.source)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "```text"]
    for family in FAMILIES.values():
        lines += [f"{family.name:<12}{line}" for line in family.picture.strip().splitlines()]
    return "\n".join([*lines, "```", ""])
