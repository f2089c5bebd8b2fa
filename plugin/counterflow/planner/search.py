"""Search of layouts: all sizes, shardings, schedules, micro-batches and recomputation that a plan leaves open, best bound first.

Each combination of sizes has a bound that needs no table (`counterflow.planner.bounds`). Combinations are tried in the order of
their bounds until the next bound is above the best found, so what is left out cannot be better; where the time ends first, that
is said. Of each schedule a second, closer bound is asked before memory is, and memory before a table is built. What does not
fit, does not divide, is slower or is not allowed keeps its reason.

Several processes share the combinations: each takes the next one, and all know the best steps that any has found.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.assumptions import Assumed
from counterflow.planner.bounds import bound_schedule, bound_step
from counterflow.planner.choices import (
    KINDS,
    MICRO_BATCHES,
    Fields,
    complete_choice,
    explain_refusal,
    find_kind,
    list_kinds,
    list_schedules,
    list_shardings,
    list_sizes,
    make_straight,
    name_fields,
)
from counterflow.planner.cluster import Cluster, build_cluster
from counterflow.planner.config import PlanConfig
from counterflow.planner.constants import Constants
from counterflow.planner.estimate import Estimate, estimate_plan, make_setting
from counterflow.planner.layouts import PLAIN_STRAIGHT, Layout, Plan, complete_split, count_gpus
from counterflow.planner.memory import GIB, MemoryEstimate, estimate_memory
from counterflow.planner.models import ModelShape, build_model
from counterflow.planner.step import ChunkCosts, cost_chunks

LARGEST_CLUSTER = 2**17
# Fewer combinations are searched sooner than a second process starts.
FEW = 64
MOST_PROCESSES = 4
# So many combinations are tried before the others, found among so many.
MOST_SEEDS, MOST_SCANNED = 4, 200


@dataclass(frozen=True)
class Rejected:
    """A layout that was not taken, in words, and why."""

    layout: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What a search found: estimates, best first; rejected layouts; how many there were, and how many the time left untried.

    ``looped`` is the best layout under Megatron's interleaved schedule, ``ours`` the best that needs counterflow.
    """

    candidates: tuple[Estimate, ...]
    rejected: tuple[Rejected, ...]
    tried: int
    untried: int
    seconds: float
    pareto: tuple[Estimate, ...] = ()
    looped: Estimate | None = None
    ours: Estimate | None = None


@dataclass(order=True, frozen=True)
class Choice:
    """Sizes, the bound on any step with them, and the plan with the plain schedule."""

    bound: float
    fields: Fields = field(compare=False)
    assumed: Assumed = field(compare=False)


@dataclass(frozen=True)
class _Task:
    """What all processes of a search know."""

    config: PlanConfig
    cluster: Cluster
    constants: Constants
    model: ModelShape
    keep: int
    deadline: float


class _Best:
    """The best steps that fit, of all processes: ``keep`` of each, and each one's best of each kind, in shared memory."""

    def __init__(self, keep: int, processes: int, kinds: Sequence[str]) -> None:
        context = get_context("fork")
        self.keep = keep
        self._next, self._found = context.Value("q", 0), context.Value("b", 0)
        self._steps = context.Array("d", [math.inf] * keep * processes, lock=False)
        self._kinds = {kind: context.Array("d", [math.inf] * processes, lock=False) for kind in kinds}

    def add(self, worker: int, seconds: float, fits: bool | None, kind: str | None) -> None:
        """Add a step; only one that surely fits is a limit to others."""
        self._found.value = 1
        if not fits:
            return
        if kind in self._kinds:
            self._kinds[kind][worker] = min(self._kinds[kind][worker], seconds)
        own = slice(worker * self.keep, (worker + 1) * self.keep)
        self._steps[own] = sorted([*self._steps[own], seconds])[: self.keep]

    def has_some(self) -> bool:
        """Tell whether any process has an estimate."""
        return bool(self._found.value)

    def limit(self, *kinds: str | None) -> float:
        """Return the seconds that a step has to be below to matter: among the first, or as the best of one of ``kinds``."""
        first: float = sorted(self._steps)[self.keep - 1]
        others = [float(min(self._kinds[kind])) for kind in kinds if kind in self._kinds]
        return max([first, *others])

    def take(self) -> int:
        """Return the number of the next combination, which no other process gets."""
        with self._next.get_lock():
            self._next.value += 1
            return int(self._next.value) - 1


def search_layouts(config: PlanConfig, constants: Constants | None = None, *, seconds: float = 50.0, keep: int = 10) -> Found:
    """Search the layouts of a plan for about so many seconds; raises `PlanError` where no layout fits its cluster.

    ``keep`` are surely the best ones where the time sufficed; others that were estimated follow.
    """
    begun, constants = time.monotonic(), constants or Constants()
    cluster = build_cluster(config.cluster)
    if count_gpus(config) is None:
        raise PlanError("cluster.gpus is missing: a search needs the number of GPUs")
    task = _Task(config, cluster, constants, build_model(config.model), keep, begun + seconds)
    rejected: list[Rejected] = []
    choices = sorted(_list_choices(task, rejected))
    seeds = _choose_seeds(task, choices)
    choices = [*seeds, *(one for one in choices if not any(one is seed for seed in seeds))]
    parts = _run(task, choices, len(seeds))
    for part in parts:
        rejected += part.rejected
    if not any(part.tried for part in parts):
        _refuse(config, cluster, rejected)
    return _finish(task, choices, parts, rejected, begun)


@dataclass(frozen=True)
class _Tried:
    """An estimate in short: how to make it again, its seconds, the bytes of its fullest rank, whether it fits."""

    fields: Fields
    seconds: float
    size: float
    fits: bool | None
    kind: str | None


@dataclass
class _Part:
    """What one process did: estimates, rejected layouts, the numbers of the combinations that it finished."""

    tried: list[_Tried] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    done: list[int] = field(default_factory=list)


# What the processes of a search share; they are forks, so that nothing of it is sent.
_shared: tuple[_Task, list[Choice], int, _Best] | None = None


def _run(task: _Task, choices: list[Choice], seeds: int) -> list[_Part]:
    """Search in as many processes as there are processors, at most a few."""
    global _shared
    count = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if len(choices) >= FEW else 1
    _shared = (task, choices, seeds, _Best(task.keep, count, list_kinds(task.config)))
    try:
        if count == 1:
            return [_search_part(0)]
        with ProcessPoolExecutor(count, get_context("fork")) as pool:
            return list(pool.map(_search_part, range(count)))
    except BrokenProcessPool:
        raise PlanError(
            "a process of the search was ended from outside, as where memory runs out: fix some sizes in layout:"
        ) from None
    finally:
        _shared = None


def _search_part(worker: int) -> _Part:
    """Try combinations, best bound first, until none can matter or the time has ended."""
    assert _shared is not None
    task, choices, seeds, best = _shared
    part, known = _Part(), _Known()
    while (number := best.take()) < len(choices):
        choice = choices[number]
        if choice.bound > best.limit(*KINDS):
            if number < seeds:
                continue
            break
        if not _try_sizes(task, choice, best, worker, part, known):
            break
        part.done.append(number)
    return part


@dataclass
class _Known:
    """What a process has found out: sizes for which nothing fits, and what the actions of a layout cost."""

    misfits: dict[tuple[Any, ...], str] = field(default_factory=dict)
    chunks: dict[Layout, ChunkCosts] = field(default_factory=dict)


def _try_sizes(task: _Task, choice: Choice, best: _Best, worker: int, part: _Part, known: _Known) -> bool:
    """Try all schedules and shardings of a combination; return whether there was time for it."""
    known.chunks.clear()
    for fields in list_schedules(task.config, choice.fields):
        try:
            assumed = complete_choice(task.config, fields, task.cluster, task.model)
        except (PlanError, ScheduleError) as error:
            part.rejected.append(Rejected(name_fields(fields), str(error)))
            continue
        # Where overlap has nothing to hide, the choice without it is the same.
        if assumed.plan.layout.overlap != bool(fields["overlap"]):
            continue
        for sharding in list_shardings(task.config):
            if time.monotonic() > task.deadline and best.has_some():
                return False
            layout = replace(assumed.plan.layout, distributed_optimizer=sharding.distributed_optimizer, fsdp=sharding.fsdp)
            shape, whole = replace(assumed, plan=replace(assumed.plan, layout=layout)), {**fields, **sharding._asdict()}
            kind = find_kind(shape.plan)
            tried = _try(task, shape, best.limit(kind), known)
            if isinstance(tried, str):
                part.rejected.append(Rejected(name_fields(whole), tried))
                continue
            part.tried.append(_Tried(whole, tried.step_s, tried.memory.worst.peak, tried.fits, kind))
            best.add(worker, tried.step_s, tried.fits, kind)
    return True


def _try(task: _Task, assumed: Assumed, limit: float, known: _Known) -> Estimate | str:
    """Return the estimate of a plan, or why it is rejected: what is found out soonest first."""
    plan, cluster = assumed.plan, task.cluster
    if refusal := explain_refusal(plan):
        return refusal
    setting = make_setting(assumed, cluster, task.constants)
    try:
        key = replace(plan.layout, schedule=PLAIN_STRAIGHT, asked_schedule=None)
        if key not in known.chunks:
            known.chunks[key] = cost_chunks(plan, setting)
        bound = bound_schedule(plan, known.chunks[key], setting)
        if bound > limit:
            return write_bound(bound)
        if reason := _screen(plan, cluster, known.misfits):
            return reason
        memory = estimate_memory(plan)
        if memory.tell_fit(cluster.memory_gib * GIB) is False:
            return explain_memory(memory, cluster)
        return estimate_plan(assumed, cluster, task.constants, memory=memory, chunks=known.chunks[key])
    except (PlanError, ScheduleError) as error:
        return str(error)


def write_bound(seconds: float) -> str:
    """Return the reason why a layout that takes at least so long was not tried."""
    return f"at least {seconds:.3g} s a step"


def _finish(task: _Task, choices: list[Choice], parts: list[_Part], rejected: list[Rejected], begun: float) -> Found:
    """Return what all processes found; the first estimates, the best of each kind and the front are made again in full."""
    tried = sorted((one for part in parts for one in part.tried), key=lambda one: one.seconds)
    sure = [one for one in tried if one.fits]
    ordered = [*sure, *(one for one in tried if not one.fits)]
    kinds = {kind: next((one for one in ordered if one.kind == kind), None) for kind in KINDS}
    first, front = ordered[: task.keep], find_pareto(tried)
    rejected += [Rejected(name_fields(one.fields), f"takes {one.seconds:.3g} s a step") for one in ordered[task.keep :]]
    left = set(range(len(choices))).difference(*(part.done for part in parts))
    worst = sure[task.keep - 1].seconds if len(sure) >= task.keep else math.inf
    for kind in list_kinds(task.config):
        worst = max(worst, min((one.seconds for one in sure if one.kind == kind), default=math.inf))
    slower = [number for number in left if choices[number].bound > worst]
    rejected += [Rejected(name_fields(choices[number].fields), write_bound(choices[number].bound)) for number in sorted(slower)]
    whole: dict[int, Estimate] = {}

    def make(one: _Tried) -> Estimate:
        if id(one) not in whole:
            whole[id(one)] = _make_again(task, one)
        return whole[id(one)]

    return Found(
        tuple(map(make, first)), tuple(rejected), len(tried), len(left) - len(slower), time.monotonic() - begun,
        tuple(map(make, front)), *(None if one is None else make(one) for one in kinds.values()),
    )  # fmt: skip


def _make_again(task: _Task, tried: _Tried) -> Estimate:
    return estimate_plan(complete_choice(task.config, tried.fields, task.cluster, task.model), task.cluster, task.constants)


def find_pareto(found: Iterable[_Tried]) -> tuple[_Tried, ...]:
    """Return those of which no other is both faster and smaller, fastest first."""
    front: list[_Tried] = []
    for one in sorted(found, key=lambda each: (each.seconds, each.size)):
        if not front or one.size < front[-1].size:
            front.append(one)
    return tuple(front)


def _list_choices(task: _Task, rejected: list[Rejected]) -> Iterator[Choice]:
    """Yield what is left open, but for schedules, with bounds; reasons of what cannot be go to ``rejected``."""
    gpus = count_gpus(task.config)
    assert gpus is not None
    for fields in list_sizes(task.config, task.model, task.cluster, gpus):
        try:
            assumed = complete_choice(task.config, make_straight(fields), task.cluster, task.model)
        except (PlanError, ScheduleError) as error:
            rejected.append(Rejected(name_fields(fields), str(error)))
            continue
        yield Choice(bound_step(assumed, task.cluster, task.constants), fields, assumed)


def _choose_seeds(task: _Task, choices: list[Choice]) -> list[Choice]:
    """Return what to try before all others: for each pipeline size the combination of the lowest bound that is sure to fit.

    Their steps are limits to the rest, of which the first are too large for the GPUs.
    """
    found: dict[int, Choice] = {}
    least = min((one.fields["micro_batch_size"] for one in choices), default=1)
    for choice in [one for one in choices if one.fields["micro_batch_size"] == least][:MOST_SCANNED]:
        pp = choice.fields["pp"]
        if pp not in found and not _explain_misfit(choice.assumed.plan, task.cluster):
            found[pp] = choice
    return sorted(found.values())[:MOST_SEEDS]


def _screen(plan: Plan, cluster: Cluster, known: dict[tuple[Any, ...], str]) -> str:
    """Return why no schedule of a plan's sizes fits, nothing where one may.

    A straight pipeline's first rank holds as many micro-batches of its part as there are ranks; no family's fullest rank holds
    less. Nor does a larger micro-batch fit where the smallest does not.
    """
    layout = plan.layout
    sizes = (layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, layout.recompute, layout.clones_per_rank)
    sharding = (layout.distributed_optimizer, layout.fsdp)
    size = layout.micro_batch_size
    for batch in sorted({min(MICRO_BATCHES[0], size), size}):
        key = (*sizes, *sharding, batch)
        if key not in known:
            known[key] = _explain_misfit(_straighten(plan, batch), cluster)
        if known[key]:
            return known[key]
    return ""


def _straighten(plan: Plan, batch: int) -> Plan:
    layout = replace(
        plan.layout, schedule=PLAIN_STRAIGHT, vpp=1, overlap=False, micro_batch_size=batch, pipeline_layout=None,
        account_for_embedding=False, account_for_loss=False,
    )  # fmt: skip
    return replace(plan, layout=complete_split(plan.model, layout, []))


def _explain_misfit(plan: Plan, cluster: Cluster) -> str:
    memory = estimate_memory(plan)
    return explain_memory(memory, cluster) if memory.tell_fit(cluster.memory_gib * GIB) is False else ""


def explain_memory(memory: MemoryEstimate, cluster: Cluster) -> str:
    """Return why a plan does not fit: the rank that needs most, and its largest part."""
    worst = memory.worst
    name, size = max(worst.parts.items(), key=lambda part: part[1])
    return (
        f"rank {worst.rank} needs {worst.peak / GIB:.0f} GiB of {cluster.memory_gib:.0f} ({name} {size / GIB:.0f} GiB)"
    )  # fmt: skip


def _refuse(config: PlanConfig, cluster: Cluster, rejected: list[Rejected]) -> None:
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
                plan = complete_choice(larger, make_straight(fields), cluster, model).plan
                if estimate_memory(plan).tell_fit(cluster.memory_gib * GIB):
                    return gpus
            except (PlanError, ScheduleError):
                continue
    return None
