"""Other schedules at a trace's costs: simulated steps, on the pipeline that the trace shows or on one that stands for any."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from counterflow.analysis.chunks import find_costs, measure_overlap, sum_parts
from counterflow.analysis.overlap import Device
from counterflow.errors import ScheduleError
from counterflow.schedule import FAMILIES, Costs, Family, build, simulate
from counterflow.schedule.actions import REDUCTION
from counterflow.schedule.costs import LEAST_OVERLAP, PerStage
from counterflow.schedule.families.one_f_one_b import ONE_F_ONE_B
from counterflow.schedule.layouts import LOOPED
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import Span

# The pipeline that schedules are compared on where a trace does not say how large its own is.
RANKS, MICROBATCHES = 8, 32
# A window this much shorter than the sum of its parts ran them in overlapped pairs.
PAIRED = 0.95


@dataclass(frozen=True)
class Alternative:
    """A schedule, the flags that ask for it, and the milliseconds of its step."""

    title: str
    flags: str
    has_pairs: bool
    step: float


@dataclass(frozen=True)
class Alternatives:
    """Schedules on a pipeline of this size, fastest first, and the one that the trace's own run is taken for.

    ``assumed`` is the overlap of pairs where the trace ran none; None where it is the trace's.
    """

    ranks: int
    microbatches: int
    steps: tuple[Alternative, ...]
    base: Alternative
    is_known: bool
    assumed: float | None


def list_alternatives(devices: Sequence[Device]) -> Alternatives | None:
    """Return the schedules that the trace's costs allow to compare; None where costs are unknown or no schedule fits."""
    devices = [device for device in devices if {"F", "I"} <= set(sum_parts(device))]
    spans = _list_spans(devices)
    if not devices or _is_bidirectional(spans) or not _is_whole(spans):
        return None
    found = find_costs(devices, "")
    given = Costs(*(found[key] for key in ("f", "i", "w", "p2p", "overlap")))
    assumed = _assume_overlap(devices) if not spans and given.overlap >= PAIRED else None
    pairs = given if assumed is None else replace(given, overlap=assumed)
    ranks, microbatches = _measure_pipeline(spans) if spans else (RANKS, MICROBATCHES)
    steps, own = [], []
    for family, has_pairs in _list_variants():
        try:
            table = build(family.name, ranks, microbatches, **_choose_options(family, has_pairs))
        except ScheduleError:
            continue
        steps.append(
            Alternative(*_name(family, has_pairs), has_pairs, simulate(table, _fit_costs(pairs, table, has_pairs)).makespan)
        )
        own += steps[-1:] if spans and _is_run_of(table, spans) else []
    if not steps:
        return None
    steps.sort(key=lambda one: one.step)
    # Of a family with pairs both variants run the same table; the costs tell whether its pairs overlapped.
    own.sort(key=lambda one: one.has_pairs != (given.overlap < PAIRED))
    base = own[0] if own else _guess_base(steps, is_paired=not spans and given.overlap < PAIRED)
    return Alternatives(ranks, microbatches, tuple(steps), base, bool(own), assumed)


def _assume_overlap(devices: Sequence[Device]) -> float:
    """Return what pairs of these kernels take of their parts' time if all that can be hidden is: the mean over devices."""
    perfect = [measure_overlap(device)[1] for device in devices]
    return min(1.0, max(LEAST_OVERLAP, sum(perfect) / len(perfect)))


def _list_variants() -> Iterator[tuple[Family, bool]]:
    """Yield families of one replica, those with pairs twice: a step of two replicas is that of twice the micro-batches."""
    for family in FAMILIES.values():
        if family.replicas == 1:
            yield family, False
            if family.pairs:
                yield family, True


def _list_spans(devices: Sequence[Device]) -> list[Span]:
    """Return the actions of the first pipeline's step, where the trace has actions; of a record each device has all of them."""
    timelines = [d.trace.timeline for d in devices if d.trace.pipeline == devices[0].trace.pipeline]
    spans = {span for timeline in timelines if timeline is not None for span in timeline.spans}
    return sorted(spans, key=lambda span: span.start)


def _is_whole(spans: Sequence[Span]) -> bool:
    """Tell whether actions are those of all ranks of a pipeline, of two at least; without actions nothing speaks against it."""
    ranks = {span.rank for span in spans}
    stages = {single.stage for span in spans for single in span.action.singles()}
    return not spans or (len(ranks) >= 2 and max(ranks) < len(ranks) and max(stages) < len(stages))


def _is_bidirectional(spans: Sequence[Span]) -> bool:
    """Tell whether two ranks run the same stage, as in full DualPipe."""
    places = {(single.stage, span.rank) for span in spans for single in span.action.singles()}
    return len(places) > len({stage for stage, _ in places})


def _measure_pipeline(spans: Sequence[Span]) -> tuple[int, int]:
    singles = [single for span in spans for single in span.action.singles()]
    return 1 + max(span.rank for span in spans), 1 + max(single.microbatch for single in singles)


def _is_run_of(table: ScheduleTable, spans: Sequence[Span]) -> bool:
    """Tell whether these actions are a table's, in its order; whole backwards stand for split ones."""
    for rank in {span.rank for span in spans}:
        ran = [(one.kind, one.stage, one.microbatch) for span in spans if span.rank == rank for one in span.action.singles()]
        planned = [(one.kind, one.stage, one.microbatch) for one in table.singles(rank) if one.kind != REDUCTION]
        if not any(kind == "W" for kind, _, _ in ran):
            planned = [("B" if kind == "I" else kind, stage, number) for kind, stage, number in planned if kind != "W"]
        if ran != planned:
            return False
    return True


def _choose_options(family: Family, has_pairs: bool) -> dict[str, bool]:
    return {"ep_overlap": True} if has_pairs and "ep_overlap" in family.options else {}


def _name(family: Family, has_pairs: bool) -> tuple[str, str]:
    """Return what a schedule is called, and all flags that a launch script needs for it."""
    chunks = " --num-virtual-stages-per-pipeline-rank 2" if family.layout == LOOPED else ""
    flags = f"--cf-schedule {family.name}{chunks}" + (" --cf-overlap" if has_pairs else "")
    return f"{family.name} with overlapped pairs" if has_pairs else family.name, flags


def _fit_costs(given: Costs, table: ScheduleTable, has_pairs: bool) -> Costs:
    """Return a table's costs: a stage that the trace has in parts takes their sum, a part of a stage of the trace its share."""
    stages, share = table.layout.last_stage + 1, table.layout.chunk_share / 0.5
    f, i, w = (_fit(cost, stages, share) for cost in (given.f, given.i, given.w))
    return Costs(f, i, w, p2p=given.p2p, overlap=given.overlap if has_pairs else 1.0)


def _fit(cost: PerStage, stages: int, share: float) -> PerStage:
    if not isinstance(cost, Sequence):
        return cost * share
    found = len(cost)
    if stages % found == 0:
        return tuple(cost[stage * found // stages] * found / stages for stage in range(stages))
    if found % stages == 0:
        return tuple(sum(cost[stage * found // stages : (stage + 1) * found // stages]) for stage in range(stages))
    return sum(cost) / stages


def _guess_base(steps: Sequence[Alternative], *, is_paired: bool) -> Alternative:
    """Return what a run may be on whose schedule is unknown: the slowest with pairs if it ran pairs, else 1F1B."""
    if is_paired and (pairs := [one for one in steps if one.has_pairs]):
        return pairs[-1]
    return next((one for one in steps if one.title == ONE_F_ONE_B.name), steps[-1])
