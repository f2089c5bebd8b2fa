"""Search of layouts: all sizes, schedules, micro-batches and recomputation that a plan leaves open, best bound first.

Each combination has a bound that needs no table: the work of its micro-batches, spread over the pipeline without a bubble, all
expert communication of overlapped pairs hidden. Combinations are tried in the order of their bounds until the next bound is
above the best found, so what is left out cannot be better; where the time ends first, that is said. What does not fit, does not
divide or is not allowed keeps its reason.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.assumptions import Assumed, assume_unstated
from counterflow.planner.cluster import Cluster, build_cluster
from counterflow.planner.config import PlanConfig
from counterflow.planner.constants import Constants
from counterflow.planner.estimate import Estimate, estimate_plan, make_setting
from counterflow.planner.layouts import (
    PLAIN_LOOPED,
    PLAIN_STRAIGHT,
    Plan,
    complete_plan,
    count_gpus,
    deal_layers,
)
from counterflow.planner.memory import GIB, MemoryEstimate, estimate_memory
from counterflow.planner.models import ModelShape, build_model
from counterflow.planner.times import time_head, time_layer
from counterflow.schedule.families import FAMILIES
from counterflow.schedule.layouts import BIDIRECTIONAL, LOOPED, STRAIGHT, V

CONTEXT_FROM = 16384
MICRO_BATCHES = (1, 2, 4)
CHUNKS = (2, 4, 8)
CLONES = (0, 2)
MOST_PIPELINE = 64
SELECTIVE = "moe_act,layernorm,mla_up_proj"
LARGEST_CLUSTER = 2**17


@dataclass(frozen=True)
class Rejected:
    """A layout that was not taken, in words, and why."""

    layout: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What a search found: estimates, best first; rejected layouts; how many there were, and how many the time left untried."""

    candidates: tuple[Estimate, ...]
    rejected: tuple[Rejected, ...]
    tried: int
    untried: int
    seconds: float
    pareto: tuple[Estimate, ...] = ()

    @property
    def plain(self) -> Estimate | None:
        """The best layout that Megatron runs itself: its own schedules, without clones."""
        own = (PLAIN_STRAIGHT, PLAIN_LOOPED)
        mine = [one for one in self.candidates if one.plan.layout.schedule in own and not one.plan.layout.clones_per_rank]
        return min(mine, key=lambda one: one.step_s, default=None)


@dataclass(order=True, frozen=True)
class _Choice:
    bound: float
    fields: dict[str, Any] = field(compare=False)
    assumed: Assumed = field(compare=False)


def search_layouts(config: PlanConfig, constants: Constants | None = None, *, seconds: float = 50.0, keep: int = 10) -> Found:
    """Search the layouts of a plan for about so many seconds; raises `PlanError` where no layout fits its cluster."""
    begun, constants = time.monotonic(), constants or Constants()
    cluster = build_cluster(config.cluster)
    if count_gpus(config) is None:
        raise PlanError("cluster.gpus is missing: a search needs the number of GPUs")
    rejected: list[Rejected] = []
    choices = sorted(_list_choices(config, cluster, constants, rejected))
    found: list[Estimate] = []
    tried = 0
    best: list[float] = []
    screened: dict[tuple[Any, ...], str] = {}
    for number, choice in enumerate(choices):
        limit = best[keep - 1] if len(best) >= keep else math.inf
        if choice.bound > limit:
            rejected += [Rejected(name_fields(one.fields), f"at least {one.bound:.3g} s a step") for one in choices[number:]]
            break
        reason = _screen(choice, cluster, screened)
        if reason:
            rejected.append(Rejected(name_fields(choice.fields), reason))
            continue
        for fields in list_schedules(config, choice.fields):
            if time.monotonic() - begun > seconds and best:
                return _finish(found, rejected, tried, len(choices) - number, time.monotonic() - begun)
            tried += 1
            estimate = _try(config, fields, cluster, constants, rejected)
            if estimate is not None:
                found.append(estimate)
                best = sorted([*best, estimate.step_s])[:keep]
    if not found:
        _refuse(config, cluster, constants, rejected)
    return _finish(found, rejected, tried, 0, time.monotonic() - begun)


def _finish(found: list[Estimate], rejected: list[Rejected], tried: int, untried: int, seconds: float) -> Found:
    ordered = sorted(found, key=lambda one: (one.fits is not True, one.step_s))
    sure = [one for one in ordered if one.fits]
    ordered = sorted(found, key=lambda one: one.step_s) if not sure else ordered
    return Found(tuple(ordered), tuple(rejected), tried, untried, seconds, find_pareto(found))


def find_pareto(found: Iterable[Estimate]) -> tuple[Estimate, ...]:
    """Return the estimates of which no other is both faster and smaller, fastest first."""
    front: list[Estimate] = []
    for one in sorted(found, key=lambda each: (each.step_s, max(each.memory.per_rank))):
        if not front or max(one.memory.per_rank) < max(front[-1].memory.per_rank):
            front.append(one)
    return tuple(front)


def name_fields(fields: dict[str, Any]) -> str:
    """Return a layout in a few words."""
    names = {"micro_batch_size": "mbs"}
    words = [f"{names.get(name, name)} {value}" for name, value in fields.items() if _is_telling(name, value)]
    return " ".join(words)


def _is_telling(name: str, value: Any) -> bool:
    if name in ("cp", "etp", "vpp", "clones_per_rank") and value in (None, 0, 1):
        return False
    return value not in (None, False, "none")


def _list_choices(config: PlanConfig, cluster: Cluster, constants: Constants, rejected: list[Rejected]) -> Iterator[_Choice]:
    """Yield what is left open, but for schedules, with bounds; reasons of what cannot be go to ``rejected``."""
    model, gpus = build_model(config.model), count_gpus(config)
    assert gpus is not None
    for fields in list_sizes(config, model, cluster, gpus):
        straight = {**fields, "schedule": PLAIN_STRAIGHT, "vpp": None, "overlap": False}
        try:
            assumed = complete_choice(config, straight, cluster)
        except (PlanError, ScheduleError) as error:
            rejected.append(Rejected(name_fields(fields), str(error)))
            continue
        yield _Choice(bound_step(assumed, cluster, constants), fields, assumed)


def complete_choice(config: PlanConfig, fields: dict[str, Any], cluster: Cluster) -> Assumed:
    """Return the complete plan of a choice; what the search chose is stated."""
    given = {name: value for name, value in fields.items() if value is not None}
    chosen = config.replace_layout(**given, **({"vpp": None} if fields.get("vpp") is None else {}))
    assumed = assume_unstated(chosen, complete_plan(chosen), cluster)
    return replace(assumed, plan=replace(assumed.plan, unstated=frozenset()))


def list_sizes(config: PlanConfig, model: ModelShape, cluster: Cluster, gpus: int) -> Iterator[dict[str, Any]]:
    """Yield all sizes that are not given: tp pp cp ep etp, micro-batch, recomputation and clones."""
    given = config.layout
    experts = next((layer.moe.experts for layer in model.layers if layer.moe is not None), 1)
    seq = config.training.seq_length or 4096
    tps = _pick(given.tp, [tp for tp in (1, 2, 4, 8, 16) if tp <= cluster.domain])
    pps = _pick(given.pp, [pp for pp in _divide(gpus) if pp <= min(len(model.layers) + 2, MOST_PIPELINE)])
    cps = _pick(given.cp, [1, 2, 4, 8, 16] if seq >= CONTEXT_FROM else [1])
    eps = _pick(given.ep, _divide(experts) if experts > 1 else [1])
    recomputes = [given.recompute] if given.recompute is not None else ["none", SELECTIVE, "full"]
    is_uneven = config.training.routing not in (None, "forced") and experts > 1
    clones = _pick(given.clones_per_rank, list(CLONES) if is_uneven else [0])
    batches = _pick(given.micro_batch_size, list(MICRO_BATCHES))
    for tp, pp, cp, ep, batch, recompute, clone in product(tps, pps, cps, eps, batches, recomputes, clones):
        whole = gpus // (tp * pp * cp)
        if gpus % (tp * pp * cp) or (given.dp is not None and whole != given.dp) or (tp * cp * whole) % (ep * (given.etp or 1)):
            continue
        if clone and ep == 1:
            continue
        yield {
            "tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": given.etp or 1, "micro_batch_size": batch, "recompute": recompute,
            "clones_per_rank": clone,
        }  # fmt: skip


def _pick(given: int | None, others: list[int]) -> list[int]:
    return others if given is None else [given]


def _divide(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0] if number < 2**16 else [2**n for n in range(17)]


def list_schedules(config: PlanConfig, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a choice under each schedule, number of chunks and overlap that the plan leaves open."""
    given = config.layout
    overlaps = [False, True] if given.overlap is None else [given.overlap]
    overlaps = overlaps if fields["ep"] > 1 else [False]
    if given.schedule is not None:
        yield from ({**fields, "schedule": given.schedule, "vpp": given.vpp, "overlap": overlap} for overlap in overlaps)
        return
    if fields["pp"] == 1:
        yield from ({**fields, "schedule": PLAIN_STRAIGHT, "vpp": None, "overlap": overlap} for overlap in overlaps)
        return
    for family in FAMILIES.values():
        if family.layout == STRAIGHT and not (family.splits or family.name == PLAIN_STRAIGHT):
            continue
        if given.vpp is not None and (family.layout == LOOPED) != (given.vpp > 1):
            continue
        chunks = (_pick(given.vpp, list(CHUNKS))) if family.layout == LOOPED else [None]
        for vpp, overlap in product(chunks, overlaps if family.pairs else [False]):
            yield {**fields, "schedule": family.name, "vpp": vpp, "overlap": overlap}


def bound_step(assumed: Assumed, cluster: Cluster, constants: Constants) -> float:
    """Return seconds that no schedule of this choice can be below: its work without bubble and exposed expert communication."""
    plan = assumed.plan
    setting = make_setting(assumed, cluster, constants)
    counts = Counter(plan.model.layers)
    total = 0.0
    for layer, times in counts.items():
        work = time_layer(layer, setting)
        whole = work.f + work.i + work.w
        total += times * max(whole.device - whole.expert, whole.host)
    head = time_head(plan.model, setting)
    total += (head.f + head.i + head.w).device * (1 + plan.model.mtp_layers)
    if plan.model.mtp is not None:
        work = time_layer(plan.model.mtp, setting)
        total += plan.model.mtp_layers * (work.f + work.i + work.w).compute
    return plan.microbatches * total / plan.layout.pp


def _screen(choice: _Choice, cluster: Cluster, known: dict[tuple[Any, ...], str]) -> str:
    """Return why no schedule of a choice fits, nothing where one may.

    A straight pipeline's first rank holds as many micro-batches of its part as there are ranks; no family's fullest rank holds
    less. Nor does a larger micro-batch fit where the smallest does not.
    """
    key = tuple(value for name, value in choice.fields.items() if name != "micro_batch_size")
    size = choice.fields["micro_batch_size"]
    if (key, size) not in known:
        smaller = known.get((key, "least"))
        if smaller is None:
            least = replace(
                choice.assumed.plan, layout=replace(choice.assumed.plan.layout, micro_batch_size=min(MICRO_BATCHES + (size,)))
            )
            smaller = known[key, "least"] = _explain_misfit(least, cluster)
        known[key, size] = smaller or _explain_misfit(choice.assumed.plan, cluster)
    return known[key, size]


def _explain_misfit(plan: Plan, cluster: Cluster) -> str:
    memory = estimate_memory(plan)
    return explain_memory(memory, cluster) if memory.tell_fit(cluster.memory_gib * GIB) is False else ""


def _try(
    config: PlanConfig, fields: dict[str, Any], cluster: Cluster, constants: Constants, rejected: list[Rejected]
) -> Estimate | None:
    try:
        assumed = complete_choice(config, fields, cluster)
        if assumed.plan.layout.overlap != bool(fields["overlap"]):
            return None
        memory = estimate_memory(assumed.plan)
        if memory.tell_fit(cluster.memory_gib * GIB) is False:
            rejected.append(Rejected(name_fields(fields), explain_memory(memory, cluster)))
            return None
        return estimate_plan(assumed, cluster, constants, memory=memory)
    except (PlanError, ScheduleError) as error:
        rejected.append(Rejected(name_fields(fields), str(error)))
        return None


def explain_memory(memory: MemoryEstimate, cluster: Cluster) -> str:
    """Return why a plan does not fit: the rank that needs most, and its largest part."""
    worst = memory.worst
    name, size = max(worst.parts.items(), key=lambda part: part[1])
    return (
        f"rank {worst.rank} needs {worst.peak / GIB:.0f} GiB of {cluster.memory_gib:.0f} ({name} {size / GIB:.0f} GiB)"
    )  # fmt: skip


def _refuse(config: PlanConfig, cluster: Cluster, constants: Constants, rejected: list[Rejected]) -> None:
    """Raise `PlanError` with what is nearest: the smallest cluster that would do, or the reasons."""
    gpus = count_gpus(config) or 1
    smallest = find_smallest(config, cluster, gpus)
    counts = Counter(one.reason for one in rejected)
    reason = counts.most_common(1)[0][0] if counts else "no sizes divide these GPUs"
    if smallest is not None:
        raise PlanError(f"no layout fits {gpus} {cluster.gpu.name}: {reason}; {smallest} GPUs would do")
    raise PlanError(f"no layout fits {gpus} {cluster.gpu.name}: {reason}; change what layout: fixes")


def find_smallest(config: PlanConfig, cluster: Cluster, above: int) -> int | None:
    """Return the smallest number of GPUs, by doubling, on which some layout fits surely; None where none was found."""
    model = build_model(config.model)
    gpus = above
    while (gpus := gpus * 2) <= LARGEST_CLUSTER:
        section = config.cluster.model_copy(update={"gpus": gpus, "nodes": None})
        larger = config.model_copy(update={"cluster": section})
        sizes = [one for one in list_sizes(larger, model, cluster, gpus) if one["micro_batch_size"] == 1]
        # Most memory is saved by full recomputation, deep pipelines and wide expert parallelism.
        sizes.sort(key=lambda one: (one["recompute"] != "full", -one["pp"] * one["tp"] * one["ep"]))
        for fields in sizes[:40]:
            try:
                plan = complete_choice(
                    larger, {**fields, "schedule": PLAIN_STRAIGHT, "vpp": None, "overlap": False}, cluster
                ).plan
                if estimate_memory(plan).tell_fit(cluster.memory_gib * GIB):
                    return gpus
            except (PlanError, ScheduleError):
                continue
    return None


def split_evenly(estimate: Estimate, config: PlanConfig, cluster: Cluster, constants: Constants) -> Estimate:
    """Return the plan with layers dealt so that ends with embedding and head get fewer, where that is faster; else the same."""
    layout = estimate.plan.layout
    if layout.pp == 1 or layout.pipeline_layout is not None or FAMILIES[layout.schedule].layout in (V, BIDIRECTIONAL):
        return estimate
    text = deal_layers(len(estimate.plan.model.layers), layout.stages, estimate.plan.model.mtp_layers)
    dealt: Plan = replace(
        estimate.plan, layout=replace(layout, pipeline_layout=text, account_for_embedding=False, account_for_loss=False)
    )
    try:
        other = estimate_plan(Assumed(dealt, estimate.setting.fp8_attention, estimate.setting.fused_permute), cluster, constants)
    except (PlanError, ScheduleError):
        return estimate
    return other if other.step_s < estimate.step_s and other.fits is not False else estimate
