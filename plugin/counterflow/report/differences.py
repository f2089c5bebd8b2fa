"""A comparison of a recorded step with its simulation, as lines for a terminal and as figures for ``--json``."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from counterflow.report.picture import write_number, write_share
from counterflow.schedule.comparison import BEGAN_LATE, RAN_LONGER, Comparison, Parting, RankDifference
from counterflow.schedule.costs import Costs
from counterflow.schedule.sharing import PairTimes, Sharing, find_sharing, sum_pairs
from counterflow.schedule.timeline import Timeline

# Lines on the critical path: those who lost most.
MOST_LOSERS = 6


def write_differences(comparison: Comparison, costs: Costs) -> str:
    """Return both makespans and bubbles, the costs, what each rank lost and where, and who held up the whole step; in ms."""
    measured, simulated = comparison.measured, comparison.simulated
    lines = [
        f"makespan measured {_write_ms(measured.makespan)}, simulated {_write_ms(simulated.makespan)}: "
        f"ratio {comparison.ratio:.4f}; bubble measured {measured.bubble:.1%}, simulated {simulated.bubble:.1%}",
        f"costs per stage in ms: {_write_costs(costs)}",
    ]
    pairs = sum_pairs_of_ranks(measured)
    for difference in comparison.ranks:
        lines += _write_rank(difference)
        lines += _write_pairs(pairs.get(difference.rank))
    lines += _write_path(comparison)
    return "\n".join(lines) + "\n"


def describe_differences(comparison: Comparison, costs: Costs) -> dict[str, Any]:
    """Return the same as figures, times in seconds, actions in the notation of tables."""
    measured, simulated = comparison.measured, comparison.simulated
    pairs = sum_pairs_of_ranks(measured)
    return {
        "measured_makespan": measured.makespan,
        "simulated_makespan": simulated.makespan,
        # JSON has no infinity: null where the simulation takes no time.
        "ratio": comparison.ratio if math.isfinite(comparison.ratio) else None,
        "measured_bubble": measured.bubble,
        "simulated_bubble": simulated.bubble,
        "costs": {name: getattr(costs, name) for name in ("f", "i", "w", "p2p", "overlap")},
        "ranks": [
            {
                "rank": difference.rank,
                "late": difference.late,
                "idle": difference.idle,
                "simulated_idle": difference.simulated_idle,
                "partings": [_describe_parting(parting) for parting in difference.partings],
                # None where the record says nothing of how the parts of pairs shared the rank.
                "pairs": asdict(pairs[difference.rank]) if difference.rank in pairs else None,
            }
            for difference in comparison.ranks
        ],
        "critical_path": [_describe_parting(parting) for parting in comparison.path],
    }


def sum_pairs_of_ranks(timeline: Timeline) -> dict[int, PairTimes]:
    """Return what the pairs of each rank took, of ranks that have recorded pairs."""
    rows: dict[int, list[Sharing]] = {}
    for sharing in find_sharing(timeline):
        rows.setdefault(sharing.span.rank, []).append(sharing)
    return {rank: pairs for rank, row in rows.items() if (pairs := sum_pairs(row)) is not None}


def _write_pairs(pairs: PairTimes | None) -> list[str]:
    if pairs is None:
        return []
    hidden = f"communication hidden {_write_ms(pairs.hidden)}, {write_share(pairs.hidden, pairs.hidden + pairs.waiting)} of it"
    times = f"computation {_write_ms(pairs.computation)}, waiting {_write_ms(pairs.waiting)}"
    return [f"  pairs:   {pairs.pairs} in {_write_ms(pairs.time)}: {times}; {hidden}"]


def _describe_parting(parting: Parting) -> dict[str, Any]:
    source = None if parting.source is None else str(parting.source)
    return {**asdict(parting), "action": str(parting.action), "source": source}


def _write_rank(difference: RankDifference) -> list[str]:
    later = "later" if difference.late >= 0 else "earlier"
    lines = [
        f"rank {difference.rank}: {_write_ms(abs(difference.late))} {later} than simulated; "
        f"idle {_write_ms(difference.idle)}, simulated {_write_ms(difference.simulated_idle)}"
    ]
    if difference.first is None or difference.largest is None:
        return lines
    lines.append(f"  first:   {write_parting(difference.first)}")
    if difference.largest != difference.first:
        lines.append(f"  largest: {write_parting(difference.largest)}")
    return lines


def write_parting(parting: Parting) -> str:
    """Return one line that says which action lost how much, why, and where to look."""
    time, source = _write_ms(parting.time), f"{parting.source} of rank {parting.source_rank}"
    head = f"position {parting.position}, {parting.action}"
    if parting.cause == RAN_LONGER:
        return f"{head} ran {time} longer than its cost"
    if parting.cause == BEGAN_LATE and parting.source is not None:
        return f"{head} began {time} after its input {source} was made and the rank was free: transfer or overhead"
    if parting.cause == BEGAN_LATE:
        return f"{head} began {time} after its rank was free, its input long made: overhead"
    return f"{head} began {time} late, its input {source} came late: look there"


def _write_path(comparison: Comparison) -> list[str]:
    losers: dict[tuple[int, str], list[Parting]] = {}
    for parting in comparison.path:
        losers.setdefault((parting.rank, parting.cause), []).append(parting)
    lost = sum(parting.time for parting in comparison.path)
    lines = [f"lost along the critical path, from the first action to the last: {_write_ms(lost)}"]
    ranked = sorted(losers.items(), key=lambda item: -_sum(item[1]))
    for (rank, cause), partings in ranked[:MOST_LOSERS]:
        most = max(partings, key=lambda parting: parting.time)
        # A microsecond is the record's own grain.
        if _sum(partings) > 1e-6 * len(partings):
            where = f"{most.action} at position {most.position} {_write_ms(most.time)}"
            lines.append(f"  rank {rank} {cause}: {_write_ms(_sum(partings))} in {len(partings)} actions, most of it {where}")
    return lines


def _sum(partings: Sequence[Parting]) -> float:
    return sum(parting.time for parting in partings)


def _write_costs(costs: Costs) -> str:
    columns = ((name.upper(), getattr(costs, name)) for name in ("f", "i", "w"))
    return "; ".join(f"{name} {_write_column(values)}" for name, values in columns) + f"; pair {costs.overlap:.3f} of its parts"


def _write_column(values: float | Sequence[float]) -> str:
    each = list(values) if isinstance(values, Sequence) else [values]
    written = [f"{1000 * value:.2f}" for value in each]
    return written[0] if len(set(written)) == 1 else " ".join(written)


def _write_ms(seconds: float) -> str:
    return f"{write_number(round(1000 * seconds, 3))} ms"
