"""The time of a step: what its actions take, put into the very table that would run.

The bubble is the simulation's, never a formula. Reductions of gradients run beside the table as its R's; what is before and
after it (gathering weights, the optimizer, the host) is added.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from counterflow.planner.clock import Clock, compile_table
from counterflow.planner.layouts import Layout, Plan, Stage, build_table, place_layers
from counterflow.planner.memory import Parameters, count_stage
from counterflow.planner.models import count_equal
from counterflow.planner.times import (
    Setting,
    Times,
    Work,
    time_embedding,
    time_head,
    time_layer,
    time_mtp,
)
from counterflow.schedule import Costs
from counterflow.schedule.families import FAMILIES
from counterflow.schedule.layouts import lay_named

# Bytes of optimizer state that a step of Adam reads and writes for each parameter, with all of it in FP32: gradient, master
# weight, two moments, and the weight in BF16.
ADAM_BYTES = 4.0 + 8.0 + 8.0 + 8.0 + 2.0
P2P_LATENCY = 15e-6
# An overlapped pair issues the launches of two streams.
PAIR_LAUNCHES = 1.25
# Adam on the host: bytes a second and GPU, of a socket that GPUs share.
HOST_ADAM_RATE = 20e9


@dataclass(frozen=True)
class Pair:
    """An overlapped pair of a chunk's F and B: its seconds, and those of its parts one after the other.

    ``hidden`` are seconds of exchange that it hides; ``host`` how much longer the GPU waits for launches than in its parts.
    """

    seconds: float
    parts: float
    hidden: float
    host: float


@dataclass(frozen=True)
class ChunkCosts:
    """What actions cost, seconds by stage, and the causes behind them."""

    costs: Costs
    work: tuple[Work, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Step:
    """A step's time in seconds and where it goes.

    ``causes`` add up to ``seconds``, as means over pipeline ranks. ``costs`` are what the table's actions cost, ``chunks`` what
    the model says of them.
    """

    seconds: float
    makespan: float
    bubble: float
    causes: dict[str, float]
    costs: Costs
    before: float
    after: float
    chunks: ChunkCosts


def time_stage(stage: Stage, plan: Plan, setting: Setting) -> Work:
    """Return the time of one micro-batch on a stage."""
    whole, setting, recompute = Work(), setting.local, plan.layout.recompute
    again = recompute.layers or 0 if recompute.method == "block" else len(stage.layers)
    for layers, how in ((stage.layers[:again], setting), (stage.layers[again:], setting.without_blocks)):
        for layer, times in count_equal(layers):
            whole += time_layer(layer, how) * times
    if stage.embedding:
        whole += time_embedding(plan.model, setting)
    if stage.head:
        whole += time_head(plan.model, setting)
    for _ in range(stage.mtp):
        whole += time_mtp(plan.model, setting.without_blocks)
    return whole


def cost_chunks(plan: Plan, setting: Setting) -> ChunkCosts:
    """Return what the actions of each stage cost."""
    stages = place_layers(plan.model, plan.layout)
    layout = plan.layout
    found: dict[tuple[object, ...], tuple[Work, float]] = {}
    works, reductions = [], []
    for stage in stages:
        key = (tuple(map(id, stage.layers)), stage.embedding, stage.head, stage.mtp)
        if key not in found:
            work = time_stage(stage, plan, setting)
            work = _add_shards(work, stage, plan, setting) if layout.fsdp else work
            found[key] = work * setting.constants["general.scale"], time_reduction(stage, plan, setting)
        works.append(found[key][0])
        reductions.append(found[key][1])
    pairs = tuple(pair_up(work, setting) for work in works)
    ratio = sum(pair.seconds for pair in pairs) / max(sum(pair.parts for pair in pairs), 1e-30)
    overlap = ratio if layout.overlap else 1.0
    inside = overlap if layout.overlap and layout.pp == 1 else 1.0
    # An action takes the host's time for it at least; a whole backward is launched as one.
    splits = []
    for work in works:
        whole = (work.i + work.w).seconds
        parts = work.i.seconds + work.w.seconds
        scale = whole / parts if parts else 1.0
        splits.append((work.f.seconds * inside, work.i.seconds * scale * inside, work.w.seconds * scale * inside))
    costs = Costs(
        tuple(f for f, _, _ in splits), tuple(i for _, i, _ in splits), tuple(w for _, _, w in splits),
        time_p2p(plan, setting), min(max(overlap, 1e-6), 2.0), True, None, None,
        tuple(reductions),
    )  # fmt: skip
    return ChunkCosts(costs, tuple(works), pairs)


def pair_up(work: Work, setting: Setting) -> Pair:
    """Return an overlapped pair of a chunk's F and B."""
    back = work.i + work.w
    exchange = work.f.expert + back.expert
    # What hides shards of weights, on the same network, hides nothing else.
    free = max(work.f.compute + back.compute - work.f.shards - back.shards, 0.0)
    hidden = setting.constants["general.hidden"] * min(exchange, free)
    device, parts = work.f.device + back.device, work.f.seconds + back.seconds
    paired = max(device - hidden, PAIR_LAUNCHES * (work.f.host + back.host))
    return Pair(paired, parts, hidden, paired - (device - hidden) - (parts - device))


def time_p2p(plan: Plan, setting: Setting) -> float:
    """Return the time from the end of an action until its result is on a neighbouring pipeline rank."""
    layout = plan.layout
    if layout.pp == 1:
        return 0.0
    rate = setting.cluster.network * setting.constants["general.network"]
    if setting.cluster.is_local(layout.gpus):
        rate = setting.cluster.nvlink * setting.constants["general.nvlink"]
    return 2.0 * setting.shared * plan.model.hidden / rate + P2P_LATENCY


def find_group_rate(setting: Setting, size: int, stride: int) -> float:
    """Return the rate of a data-parallel ring: between domains, all members of one share their network ports."""
    cluster = setting.cluster
    if size * stride <= cluster.domain:
        return cluster.nvlink * setting.constants["general.nvlink"]
    members = max(cluster.domain // stride, 1)
    return min(
        cluster.network * members * setting.constants["general.network"], cluster.nvlink * setting.constants["general.nvlink"]
    )


def time_groups(setting: Setting, held: Parameters, size: float) -> float:
    """Return the time to scatter or gather ``size`` bytes of each parameter over data-parallel ranks."""
    layout = setting.layout
    seconds = 0.0
    ranks = layout.dp * layout.cp
    if ranks > 1:
        seconds += held.dense * size * (ranks - 1) / ranks / find_group_rate(setting, ranks, layout.tp)
    if layout.edp > 1 and held.experts:
        rate = find_group_rate(setting, layout.edp, layout.ep * layout.etp)
        seconds += held.experts * size * (layout.edp - 1) / layout.edp / rate
    return seconds


def time_reduction(stage: Stage, plan: Plan, setting: Setting) -> float:
    """Return the time to reduce the gradients of a stage, once a step."""
    if plan.layout.fsdp:
        return 0.0
    held = count_stage(stage, plan.model, plan.layout)
    rounds = 1.0 if plan.layout.distributed_optimizer else 2.0
    return rounds * time_groups(setting, held, setting.grad_bytes)


def _add_shards(work: Work, stage: Stage, plan: Plan, setting: Setting) -> Work:
    """Add gathering a stage's weights before its forward and its backward, and scattering its gradients."""
    held = count_stage(stage, plan.model, plan.layout)
    gather = time_groups(setting, held, 2.0)
    scatter = time_groups(setting, held, float(setting.grad_bytes))
    return work + Work(Times(shards=gather), Times(shards=gather + scatter))


def time_ends(plan: Plan, setting: Setting, stages: tuple[Stage, ...]) -> tuple[float, float, float]:
    """Return seconds of gathering weights before the step, of the optimizer, and of the host, of the slowest pipeline rank."""
    layout = plan.layout
    gather = optimizer = 0.0
    homes = list_homes(layout)
    for rank in range(layout.pp):
        held = Parameters()
        for stage in (stages[index] for index in homes[rank]):
            held += count_stage(stage, plan.model, layout)
        shards = layout.distributed_optimizer or layout.fsdp
        own = held.dense / (layout.dp * layout.cp if shards else 1) + held.experts / (layout.edp if shards else 1)
        adam = own * ADAM_BYTES * (1 - layout.optimizer_offload) / setting.memory_rate
        # Gradients go to the host and weights come back; the host's Adam is bound by its memory.
        moved = own * layout.optimizer_offload * 6.0 / setting.cluster.gpu.pcie
        adam += moved + own * layout.optimizer_offload * ADAM_BYTES / HOST_ADAM_RATE
        optimizer = max(optimizer, adam)
        if layout.distributed_optimizer and not layout.fsdp and not layout.overlap_param_gather:
            gather = max(gather, time_groups(setting, held, 2.0))
    return gather, optimizer, 1e-3 * setting.constants["general.step_ms"]


@lru_cache(maxsize=256)
def _list_homes(key: tuple[str, int, int]) -> tuple[tuple[int, ...], ...]:
    schedule, pp, vpp = key
    if schedule.lower().endswith(".csv"):
        return build_table(Layout(schedule=schedule), 1).layout.stages
    family = FAMILIES[schedule]
    return lay_named(family.layout, pp * family.replicas, vpp).stages[:pp]


def list_homes(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Return the stages that each pipeline rank holds."""
    return _list_homes((layout.schedule, layout.pp, layout.vpp))


# Micro-batches of a longer step repeat themselves: so many rounds of the pipeline are simulated, the rest goes on at the pace of
# the last of them.
ROUNDS = 6


@lru_cache(maxsize=512)
def _compile(layout_key: tuple[str, int, int, bool], microbatches: int) -> Clock:
    schedule, pp, vpp, overlap = layout_key
    layout = Layout(pp=pp, vpp=vpp, schedule=schedule, overlap=overlap)
    return compile_table(build_table(layout, microbatches))


def cut_microbatches(layout: Layout, microbatches: int) -> int:
    """Return the number of micro-batches to simulate of a step with so many."""
    period = layout.pp
    most = ROUNDS * period + microbatches % period
    if layout.schedule.lower().endswith(".csv") or microbatches <= most + 2 * period:
        return microbatches
    return most


def run_table(layout: Layout, microbatches: int, costs: Costs) -> tuple[float, float]:
    """Return makespan and busy share of a step, as the simulation of its table gives them."""
    key = (layout.schedule, layout.pp, layout.vpp, layout.overlap)
    cut = cut_microbatches(layout, microbatches)
    clock = _compile(key, cut)
    makespan, busy = clock.run(costs)
    if cut == microbatches:
        return makespan, busy / (makespan * clock.ranks)
    before, busy_before = _compile(key, cut - layout.pp).run(costs)
    rounds = (microbatches - cut) / layout.pp
    whole = makespan + rounds * (makespan - before)
    return whole, (busy + rounds * (busy - busy_before)) / (whole * clock.ranks)


def time_step(plan: Plan, setting: Setting, chunks: ChunkCosts | None = None, costs: Costs | None = None) -> Step:
    """Return the step of a plan; ``chunks`` are known from before, ``costs``, as measured, take the place of the model's."""
    stages = place_layers(plan.model, plan.layout)
    chunks = cost_chunks(plan, setting) if chunks is None else chunks
    costs = (chunks.costs if costs is None else costs).spread(plan.layout.stages)
    makespan, busy = run_table(plan.layout, plan.microbatches, costs)
    # A long step's makespans go on from its first rounds, so that they may differ by a rounding.
    without = min(run_table(plan.layout, plan.microbatches, replace(costs, reduce=0.0))[0], makespan)
    before, optimizer, host = time_ends(plan, setting, stages)
    causes = share_causes(plan, chunks, costs, without, busy * makespan)
    causes |= {
        "gradient reduction": makespan - without, "weight gather": causes["weight gather"] + before, "optimizer": optimizer,
        "host and rest": host,
    }  # fmt: skip
    bubble = 1.0 - busy * makespan / without if without else 0.0
    return Step(makespan + before + optimizer + host, makespan, bubble, causes, costs, before, optimizer + host, chunks)


# Causes of an action's time, in the order in which a measured pair is taken to hide them.
HIDDEN_FIRST = ("experts' exchange", "tensor parallel", "context parallel", "weight gather", "host", "compute")


def share_causes(plan: Plan, chunks: ChunkCosts, costs: Costs, makespan: float, computed: float) -> dict[str, float]:
    """Return where the makespan goes, as means over pipeline ranks, in seconds; ``computed`` of them a rank has work.

    Each stage's ``costs`` are shared out as the model's own. Actions one after the other would take longer than ``computed``:
    pairs save the difference, exchange that they hide less what their launches take longer.
    """
    shares, saved = dict.fromkeys(("compute", *HIDDEN_FIRST), 0.0), {"experts' exchange": 0.0, "host": 0.0}
    (f, i, w), given = ([_as_list(part) for part in (one.f, one.i, one.w)] for one in (chunks.costs, costs))
    for stage, (work, pair) in enumerate(zip(chunks.work, chunks.pairs, strict=True)):
        own = f[stage] + i[stage] + w[stage]
        times = plan.microbatches / plan.layout.pp * (sum(part[stage] for part in given) / own if own else 0.0)
        for name, seconds in _share_work(work, pair.parts).items():
            shares[name] += seconds * times
        saved["experts' exchange"] += pair.hidden * times
        saved["host"] -= pair.host * times
    alone = sum(shares.values())
    # One rank runs all of its chunks in pairs; of a pipeline's table, what it takes less says how much is in pairs.
    ratio = costs.overlap if plan.layout.pp > 1 else chunks.costs.overlap
    paired = min((alone - computed) / (1.0 - ratio) / alone, 1.0) if alone and abs(1.0 - ratio) > 1e-9 else 0.0
    for name, seconds in saved.items():
        shares[name] -= max(paired, 0.0) * seconds
    _hide(shares, sum(shares.values()) - computed)
    return {**shares, "bubble": makespan - computed}


def _share_work(work: Work, seconds: float) -> dict[str, float]:
    """Return where a chunk's time goes that takes so many seconds; what is not the GPU's own is waiting for the host."""
    back, found = work.i + work.w, dict.fromkeys(HIDDEN_FIRST, 0.0)
    for part in (work.f, back):
        found["compute"] += part.compute
        found["tensor parallel"] += part.tensor
        found["context parallel"] += part.context
        found["experts' exchange"] += part.expert
        found["weight gather"] += max(part.shards - part.compute - part.tensor - part.context - part.sync, 0.0)
    return found | {"host": max(seconds - sum(found.values()), 0.0)}


def _hide(shares: dict[str, float], seconds: float) -> None:
    """Take so many seconds from the causes, none below nothing; what pairs take longer than their parts is the host's."""
    if seconds < 0:
        shares["host"] -= seconds
        return
    for name in HIDDEN_FIRST:
        taken = min(shares[name], seconds)
        shares[name], seconds = shares[name] - taken, seconds - taken


def _as_list(cost: object) -> tuple[float, ...]:
    assert isinstance(cost, tuple)
    return cost
