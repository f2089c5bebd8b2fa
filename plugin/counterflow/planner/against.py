"""A plan beside a measurement of it: seconds of a step by cause, as the model predicts them and as a trace or record has them.

A trace tells causes apart by the kind of a kernel and by the process group that it names. Where it names none, what no size of
the plan tells apart stands in one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from counterflow.analysis import Device, analyze_trace, read_traces
from counterflow.analysis.chunks import find_costs
from counterflow.analysis.classes import IS_COMMUNICATION, KINDS
from counterflow.analysis.cluster import check_files, measure_waiting
from counterflow.analysis.intervals import Union, subtract, unite
from counterflow.errors import PlanError, TraceError
from counterflow.planner.estimate import Estimate
from counterflow.planner.explain import explain_step
from counterflow.planner.layouts import Layout
from counterflow.planner.measured import MOST_OFF
from counterflow.schedule.families import FAMILIES

NANOSECONDS = 1e9
# What `Step.causes` calls them, and what stands in the comparison.
EXPERT, TENSOR, CONTEXT, DATA, PIPELINE = "exposed EP", "exposed TP", "exposed CP", "exposed DP", "bubble"
COLLECTIVES = "other collectives"
PREDICTED = {
    "compute": "compute", "optimizer": "optimizer", "experts' exchange": EXPERT, "tensor parallel": TENSOR,
    "context parallel": CONTEXT, "gradient reduction": DATA, "weight gather": DATA, "bubble": PIPELINE, "imbalance": "imbalance",
    "host": "host", "host and rest": "host",
}  # fmt: skip
ORDER = ("compute", "optimizer", EXPERT, TENSOR, CONTEXT, DATA, COLLECTIVES, PIPELINE, "imbalance", "copies", "host")
# Kernels by which expert-parallel ranks exchange tokens.
EXCHANGES = ("ep_dispatch", "ep_combine", "ep_notify", "ep_layout", "ep_other", "all_to_all")
# Words in Megatron's descriptions of its process groups: the first that is there counts.
WORDS = (
    ("EXPERT_DATA", DATA), ("EXPERT", EXPERT), ("DATA_PARALLEL", DATA), ("DISTRIBUTED_OPTIMIZER", DATA), ("CONTEXT", CONTEXT),
    ("TENSOR", TENSOR), ("PIPELINE", PIPELINE), ("EMBEDDING", PIPELINE),
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One cause, predicted and measured, in seconds; None where only one side knows it."""

    cause: str
    predicted: float | None
    measured: float | None


@dataclass(frozen=True)
class Comparison:
    """A step by cause, and the parts of a chunk as means over stages.

    ``notes`` say how what was measured is to be read, ``warning`` by what it seems to be of another run than the plan's.
    """

    causes: tuple[Compared, ...]
    chunks: tuple[Compared, ...]
    notes: tuple[str, ...]
    warning: str = ""

    @property
    def remarks(self) -> tuple[str, ...]:
        """All that is to be said, the warning first."""
        return (*filter(None, (self.warning,)), *self.notes)


def compare_measured(estimate: Estimate, path: Path) -> Comparison:
    """Return predicted and measured seconds by cause: of a profiler's trace, or a record of ``--cf-record``.

    Measured are means over the devices of the files, for one step. Raises `CounterflowError` that names the file.
    """
    traces = read_traces(path)
    check_files(traces)
    devices = [device for trace in traces for device in analyze_trace(trace)]
    if not devices:
        raise PlanError(f"--against {path} has no device; give a trace or record of one step")
    layout, has_actions = estimate.plan.layout, devices[0].trace.timeline is not None
    measured = measure_causes(devices, layout)
    predicted = predict_causes(estimate, without=_list_unseen(measured) if has_actions else ())
    notes = list(_note(estimate, devices, measured))
    if COLLECTIVES in measured:
        predicted[COLLECTIVES] = sum(predicted.pop(cause, 0.0) for cause in list_collectives(layout))
        notes.append(f"the files do not say which groups run collectives: {' and '.join(list_collectives(layout))} are one row")
    rows = [
        Compared(cause, predicted.get(cause), measured.get(cause)) for cause in ORDER if cause in predicted or cause in measured
    ]
    whole = Compared("step", sum(predicted.values()), sum(measured.values()))
    chunks = tuple(_compare_chunks(estimate, devices))
    differ = [*_list_differences(estimate, devices), *_list_far((whole, *chunks))]
    warning = f"{path} seems to be of another run than the plan: {'; '.join(differ)}" if differ else ""
    return Comparison((whole, *rows), chunks, tuple(notes), warning)


def _list_differences(estimate: Estimate, devices: Sequence[Device]) -> Iterator[str]:
    """Yield the sizes that a measurement states and in which it differs from a plan."""
    plan, trace = estimate.plan, devices[0].trace
    layout = plan.layout
    sizes: list[tuple[str, int, int]] = []
    if trace.world_size is not None:
        sizes.append(("ranks", trace.world_size, layout.gpus))
    if trace.timeline is not None:
        singles = [one for span in trace.timeline.spans for one in span.action.singles()]
        # Full DualPipe's table is that of two replicas.
        replicas = FAMILIES[layout.schedule].replicas if layout.schedule in FAMILIES else 1
        sizes += [
            ("pipeline ranks", trace.timeline.ranks, layout.pp * replicas),
            ("stages", 1 + max((one.stage for one in singles), default=0), layout.stages),
            ("micro-batches", len({one.microbatch for one in singles}), plan.microbatches * replicas),
        ]
    for name, own, planned in sizes:
        if own != planned:
            yield f"{own} {name}, {planned} planned"


def _list_far(rows: Sequence[Compared]) -> Iterator[str]:
    """Yield what takes so much longer or shorter than predicted that no error of the model explains it."""
    for one in rows:
        if one.predicted and one.measured and not 1 / MOST_OFF <= one.measured / one.predicted <= MOST_OFF:
            yield f"{one.cause} {one.measured:.3g} s, {one.predicted:.3g} s predicted"
            return


def predict_causes(estimate: Estimate, without: Sequence[str] = ()) -> dict[str, float]:
    """Return the prediction by the causes of a comparison, those left out that a measurement does not hold."""
    found: dict[str, float] = {}
    for bar in explain_step(estimate):
        cause = PREDICTED[bar.cause]
        if bar.cause not in without:
            found[cause] = found.get(cause, 0.0) + bar.seconds
    return found


def _list_unseen(measured: Mapping[str, float]) -> tuple[str, ...]:
    """Return the predicted causes that lie before and after the actions of a step, which is what a record holds."""
    return ("weight gather", "host and rest", *(("optimizer",) if "optimizer" not in measured else ()))


def measure_causes(devices: Sequence[Device], layout: Layout) -> dict[str, float]:
    """Return seconds of a step by cause, as means over devices; no instant counts twice.

    What ranks of a pipeline wait for in messages, or in nothing, is the bubble. What they wait for each other in exchanges of
    experts is imbalance, where several ranks are there to tell.
    """
    totals: dict[str, float] = {}
    with_actions = [device for device in devices if device.trace.timeline is not None]
    ends = {
        d.trace.pipeline: (
            min(o.first for o in devices if o.trace.pipeline == d.trace.pipeline),
            max(o.last for o in devices if o.trace.pipeline == d.trace.pipeline),
        )
        for d in with_actions
    }
    for device in devices:
        first, last = (
            ends.get(device.trace.pipeline, (device.first, device.last))
            if device in with_actions
            else (device.first, device.last)
        )
        for cause, time in _share_window(device, layout, last - first):
            totals[cause] = totals.get(cause, 0.0) + time
    waits = [wait for wait in measure_waiting(devices, EXCHANGES) if wait is not None]
    if len(waits) == len(devices) and totals.get(EXPERT):
        uneven = min(float(sum(waits)), totals[EXPERT])
        totals |= {EXPERT: totals[EXPERT] - uneven, "imbalance": uneven}
    steps = len(devices) * max(len(devices[0].trace.steps), 1)
    return {cause: time / NANOSECONDS / steps for cause, time in totals.items()}


def _share_window(device: Device, layout: Layout, window: int) -> Iterator[tuple[str, float]]:
    """Yield nanoseconds of a device's window by cause: computation first, of communication what lies outside all before it."""
    work = device.trace.work
    start, end = work.start[device.rows], work.end[device.rows]
    steps = float(sum(time for (kind, _), time in device.owned.items() if kind == "optimizer"))
    yield "compute", device.compute.length - steps
    if steps:
        yield "optimizer", steps
    causes = np.array(
        [
            _find_cause(kind, group, device, layout)
            for kind, group in zip(device.kind_of.tolist(), work.group[device.rows].tolist(), strict=True)
        ]
    )
    covered = device.compute
    for cause in (EXPERT, CONTEXT, TENSOR, DATA, COLLECTIVES, PIPELINE):
        own = causes == cause
        runs = unite(start[own], end[own])
        if own.any():
            yield cause, float(subtract(runs, covered).length)
            covered = _join(covered, runs)
    busy = device.busy
    yield "copies", float(busy - covered.length)
    yield PIPELINE, float(window - busy)


def _join(one: Union, other: Union) -> Union:
    return unite(np.concatenate([one.starts, other.starts]), np.concatenate([one.ends, other.ends]))


def _find_cause(kind: int, group: int, device: Device, layout: Layout) -> str:
    if kind < 0 or not IS_COMMUNICATION[kind]:
        return ""
    trace, name = device.trace, KINDS[kind]
    described = trace.groups[group].upper() if 0 <= group < len(trace.groups) else ""
    for word, cause in WORDS:
        if word in described:
            return cause
    if name in EXCHANGES:
        return EXPERT
    if name == "send_recv":
        return PIPELINE
    # A record holds what was waited for inside an action, which is the exchange of a pair.
    if name == "other_communication" and trace.form in ("record", "timeline"):
        return EXPERT
    some = list_collectives(layout)
    return some[0] if len(some) == 1 else COLLECTIVES


def list_collectives(layout: Layout) -> list[str]:
    """Return what runs collectives other than exchanges of experts in a layout."""
    sizes = ((TENSOR, layout.tp), (CONTEXT, layout.cp), (DATA, layout.dp))
    return [cause for cause, size in sizes if size > 1] or [DATA]


def _note(estimate: Estimate, devices: Sequence[Device], measured: Mapping[str, float]) -> Iterator[str]:
    layout, count = estimate.plan.layout, len({device.trace.rank for device in devices})
    if devices[0].trace.timeline is not None:
        yield "the files hold the actions of a step: what is before and after them is left out on both sides"
    else:
        yield "bubble, as measured, holds the host's gaps too: nothing runs in both"
    if count < layout.pp:
        yield f"the files hold {count} of {layout.pp} pipeline ranks; the prediction is a mean over all"
    if "imbalance" not in measured and layout.ep > 1:
        yield "waiting for slower expert ranks is in exposed EP: it takes files of several ranks of one group to tell it apart"


def _compare_chunks(estimate: Estimate, devices: Sequence[Device]) -> Iterator[Compared]:
    """Yield what a chunk's parts take, as means over stages, and an overlapped pair over the sum of its parts."""
    try:
        measured = find_costs(devices, "")
    except TraceError:
        return
    costs = estimate.step.costs
    (f, i, w), (own_f, own_i, own_w) = (
        [_average(part) for part in parts]
        for parts in ((costs.f, costs.i, costs.w), [np.asarray(measured[key]) / 1e3 for key in "fiw"])
    )
    yield Compared("forward of a chunk", f, own_f)
    yield Compared("backward of a chunk", i + w, own_i + own_w)
    if own_w:
        yield Compared("its weight gradients", w, own_w)
    if estimate.plan.layout.overlap:
        yield Compared("a pair over its parts", costs.overlap, float(measured["overlap"]))


def _average(values: object) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))
