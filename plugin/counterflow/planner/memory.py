"""Memory of each pipeline rank over a step, in parts, by formula.

Static parts are weights, gradients and optimizer state of the rank's chunks. Activations follow the schedule's own table: each F
leaves what its chunk keeps (`counterflow.planner.activations`), each B, I and W takes it away. All figures are bytes of one GPU.

What no formula knows is stated as an allowance with an interval: buffers of frameworks, and what the allocator loses between
blocks. Sources: end-of-iteration memory of published runs lies 0.1 to 3 GB above weights, gradients and optimizer state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from counterflow.arrays import Array
from counterflow.planner.activations import BF16, FP32, Held, StageSizes, has_final_norm, size_element
from counterflow.planner.layouts import Layout, Plan, Recompute, Stage, build_table, place_layers
from counterflow.planner.models import LINEAR, MLA, LayerShape, ModelShape
from counterflow.schedule.table import ScheduleTable
from counterflow.schedule.timeline import HELD_AFTER, Timeline

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# Workspaces of cuBLAS and Transformer Engine, small buffers, rounding up: low, likely, high, and a share of static parts.
FRAMEWORK = (0.1e9, 0.3e9, 1.5e9)
FRAMEWORK_SHARE = (0.0, 0.01, 0.03)
# How far activations by formula are from those of the real modules.
ACTIVATION_SPREAD = (0.95, 1.0, 1.05)
# Outside torch's allocator: the CUDA context and NCCL's channels.
OUTSIDE = (1.5e9, 3e9, 6e9)
# Reserved over allocated: the least, the usual, and what made runs fail at 74 % of a card.
FRAGMENTATION = (1.0, 1.05, 1.12)
EXPANDABLE_FRAGMENTATION = (1.0, 1.02, 1.05)
# A rank's tokens over the mean of its expert group, with routing that was not forced: low, likely, high.
NATURAL_IMBALANCE = (1.0, 1.1, 1.3)
# Bytes of a quantized weight, by rows and by columns.
QUANTIZED = {"fp8-delayed": 2.0, "fp8-tensorwise": 2.0, "fp8-blockwise": 2.0, "mxfp8": 2.0 * 33 / 32, "nvfp4": 2.0 * 9 / 16}
# What a pair of an F and a B with expert overlap adds to activations.
PAIR_SHARE = 0.004
# Micro-batches for each pipeline rank after which a table only repeats.
STEADY = 2


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank: bytes by part at its peak. ``parts`` sum to ``peak``; ``static`` is there all the time.

    ``low`` and ``high`` are the interval of the peak.
    """

    rank: int
    parts: dict[str, float]
    static: float
    peak: float
    low: float
    high: float
    stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory by pipeline rank, and what each stage's micro-batch holds, from which memory over time follows."""

    ranks: tuple[RankMemory, ...]
    held: tuple[Held, ...] = field(repr=False)
    fragmentation: tuple[float, float, float] = FRAGMENTATION
    outside: tuple[float, float, float] = OUTSIDE

    @property
    def per_rank(self) -> tuple[float, ...]:
        """Peaks by pipeline rank, in GiB."""
        return tuple(one.peak / GIB for one in self.ranks)

    @property
    def parts(self) -> dict[str, tuple[float, ...]]:
        """Each part by pipeline rank, in bytes."""
        return {name: tuple(one.parts[name] for one in self.ranks) for name in self.ranks[0].parts}

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most."""
        return max(self.ranks, key=lambda one: one.peak)

    def tell_fit(self, card_bytes: float) -> bool | None:
        """Return whether the plan fits a card: True where the high end is at most 95 % of it, False where the low end is more."""
        low = max(one.low for one in self.ranks) * self.fragmentation[0] + self.outside[0]
        high = max(one.high for one in self.ranks) * self.fragmentation[1] + self.outside[1]
        if high <= 0.95 * card_bytes:
            return True
        return False if low > card_bytes else None

    def follow(self, timeline: Timeline) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Return each rank's bytes over time, ``(time, bytes)`` from then on, for a simulated or recorded timeline."""
        rows: list[list[tuple[float, float]]] = [[(0.0, one.static)] for one in self.ranks]
        for span in timeline.spans:
            rank = min(span.rank, 2 * len(self.ranks) - 1 - span.rank)
            for single in span.action.singles():
                activations, queued = HELD_AFTER[single.kind]
                held = self.held[single.stage]
                bytes_now = rows[rank][-1][1] + activations * held.kept + queued * held.queued
                rows[rank].append((span.start if single.kind == "F" else span.end, bytes_now))
        return tuple(map(tuple, rows))


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank: ``dense`` (replicated over DP x CP), ``experts`` (over EDP); ``linear`` of them in linears."""

    dense: float = 0.0
    experts: float = 0.0
    linear: float = 0.0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.dense + other.dense, self.experts + other.experts, self.linear + other.linear)


def count_layer(layer: LayerShape, layout: Layout) -> Parameters:
    """Return the parameters of a layer that one rank holds."""
    parts, tp = layer.parameters, layout.tp
    replicated = count_replicated(layer)
    # Whole on each tensor-parallel rank: what is added behind a row-parallel linear, and the shared experts' gate.
    shared = layer.moe.shared if layer.moe is not None else None
    ends = sum(layer.hidden for ffn in (layer.ffn, shared) if ffn is not None and ffn.bias)
    ends += layer.hidden if layer.moe is not None and shared is not None and layer.moe.shared_gate else 0
    attention = replicated + (parts["attention"] - replicated) / tp
    sharded = attention + ends + (parts["dense"] + parts["shared"] - ends) / tp
    experts = parts["experts"] / (layout.ep * layout.etp)
    norms = parts["norms"]
    if layer.attention.kind == MLA and not layer.attention.q_lora:
        # Megatron puts a second norm before the queries' linear.
        norms += layer.hidden
    return Parameters(sharded + norms + parts["router"], experts, sharded + experts)


def count_replicated(layer: LayerShape) -> int:
    """Return an attention's parameters that each tensor-parallel rank holds whole: MLA's down-projections, norms of heads."""
    a, h = layer.attention, layer.hidden
    if a.kind == MLA:
        return h * (a.q_lora + a.kv_lora + a.rope_dim) + (a.q_lora + a.kv_lora if a.qk_norm else 0)
    if a.kind == LINEAR:
        return a.v_head_dim
    return (2 * a.head_dim if a.qk_norm else 0) + (h if a.out_bias else 0)


def _count_equal(layers: Sequence[LayerShape]) -> list[tuple[LayerShape, int]]:
    """Return each different layer, by identity, and how often it is there."""
    found: dict[int, tuple[LayerShape, int]] = {}
    for layer in layers:
        found[id(layer)] = (layer, found.get(id(layer), (layer, 0))[1] + 1)
    return list(found.values())


def count_stage(stage: Stage, model: ModelShape, layout: Layout) -> Parameters:
    """Return the parameters of a stage that one rank holds; an MTP stage keeps an embedding, and a head, of its own."""
    total = Parameters()
    for layer, times in _count_equal(stage.layers):
        one = count_layer(layer, layout)
        total += Parameters(times * one.dense, times * one.experts, times * one.linear)
    table = model.pad_vocab(layout.tp) * model.hidden / layout.tp
    if stage.embedding or stage.mtp:
        total += Parameters(dense=table + (model.positions * model.hidden if stage.embedding else 0))
    # A tied head is the embedding of the same stage, or a copy of it.
    if (stage.head or stage.mtp) and not (model.tied and (stage.embedding or stage.mtp)):
        total += Parameters(dense=table)
    if has_final_norm(stage, model):
        total += Parameters(dense=model.norm_size)
    if stage.mtp and model.mtp is not None:
        own = count_layer(model.mtp, layout)
        projection = 2 * model.hidden**2 / layout.tp
        total += Parameters(
            stage.mtp * (own.dense + 3 * model.norm_size + projection),
            stage.mtp * own.experts,
            stage.mtp * (own.linear + projection),
        )
    return total


def size_static(parameters: Parameters, plan: Plan, moe_layers: int = 0, expert_size: float = 0.0) -> dict[str, float]:
    """Return the bytes of weights, gradients, optimizer state and clones of a rank.

    ``expert_size`` is the parameters of one expert of the rank, ``moe_layers`` the layers that have clones of it.
    """
    layout, training = plan.layout, plan.training
    shards, expert_shards = layout.dp * layout.cp, layout.edp
    weight = FP32 if training.precision == "fp32" else BF16
    whole = parameters.dense + parameters.experts
    weights = weight * whole
    if training.precision in QUANTIZED:
        # With FP8 parameters alone they take the place of BF16's.
        weights += parameters.linear * (QUANTIZED[training.precision] - (weight if training.fp8_params else 0))
    grads = BYTES[training.main_grads] * whole
    # Moments that are offloaded leave the weights in FP32 behind.
    moments = (BYTES[training.exp_avg] + BYTES[training.exp_avg_sq]) * (1 - layout.optimizer_offload)
    state = moments + (0 if training.precision == "fp32" else BYTES[training.main_params])
    split = parameters.dense / shards + parameters.experts / expert_shards
    optimizer = state * (split if layout.distributed_optimizer or layout.fsdp else whole)
    if layout.fsdp:
        weights, grads = (size * split / whole for size in (weights, grads))
    clones = layout.clones_per_rank * moe_layers * expert_size * (weight + BYTES[training.main_grads])
    return {"weights": weights, "gradients": grads, "optimizer": optimizer, "clones": clones}


@dataclass(frozen=True)
class Measured:
    """What the real modules of a stage hold: parameters of one rank, and the bytes that a micro-batch keeps."""

    parameters: Parameters
    kept: float


def estimate_memory(
    plan: Plan,
    table: ScheduleTable | None = None,
    imbalance: float | None = None,
    measured: Mapping[int, Measured] | None = None,
) -> MemoryEstimate:
    """Return the memory of every pipeline rank of a plan under its table.

    Without a table, that of the plan's schedule is built, with as many micro-batches as its peak needs. ``imbalance`` is the
    tokens of a rank over the mean of its expert group; without it 1 where routing is forced, else an interval. Raises `PlanError`
    where layers do not divide, `ScheduleError` for sizes that the schedule does not allow. ``measured``, by stage, takes the
    place of what the formula says.
    """
    rows = _list_plan_rows(plan) if table is None else list_rows(table)
    low, likely, high = choose_imbalance(plan, imbalance)
    cases = [_Case(relax_plan(plan), low), _Case(plan, likely), _Case(tighten_plan(plan), high)]
    if measured is not None:
        ratios = {stage: one.kept / max(cases[1].held[stage].kept, 1.0) for stage, one in measured.items()}
        for case in cases[1:]:
            case.take(measured, ratios)
    ranks = []
    for rank in range(plan.layout.pp):
        # A table of full DualPipe has two rows for each pipeline rank.
        own = {rank, len(rows) - 1 - rank} if len(rows) == 2 * plan.layout.pp else {rank}
        ranks.append(max((_estimate_rank(cases, *rows[row], rank) for row in own), key=lambda one: one.peak))
    fragmentation = EXPANDABLE_FRAGMENTATION if plan.layout.expandable_segments else FRAGMENTATION
    return MemoryEstimate(tuple(ranks), tuple(cases[1].held), fragmentation)


@dataclass(frozen=True)
class _States:
    """The different states of a row of a table: for each, counts by chunk (arrays ``[states, chunks]``).

    ``live`` activations, ``queued`` weight gradients, and which chunks are at work: ``back`` in a B or I, ``ahead`` in an F.
    """

    live: Array
    queued: Array
    back: Array
    ahead: Array
    paired: Array


def _list_states(table: ScheduleTable, row: int) -> _States:
    """Return the states of a row while its actions run; most of a table only repeats them."""
    own = {stage: chunk for chunk, stage in enumerate(table.layout.stages[row])}
    live, queued = [0] * len(own), [0] * len(own)
    found: dict[tuple[tuple[int, ...], ...], None] = {}
    for action in table.actions[row]:
        singles = tuple(action.singles())
        back, ahead = [0] * len(own), [0] * len(own)
        for one in singles:
            if one.kind == "F":
                live[own[one.stage]] += 1
                ahead[own[one.stage]] = 1
            elif one.kind in "BI":
                back[own[one.stage]] = 1
        found[(tuple(live), tuple(queued), tuple(back), tuple(ahead), (int(len(singles) > 1),))] = None
        for one in singles:
            activations, waiting = HELD_AFTER[one.kind]
            queued[own[one.stage]] += waiting
            live[own[one.stage]] += min(activations, 0)
    return _States(*(np.array(part, dtype=np.float64) for part in zip(*found, strict=True)))


Rows = tuple[tuple[tuple[int, ...], _States], ...]


def list_rows(table: ScheduleTable) -> Rows:
    """Return the stages of each rank of a table, and the states that it passes."""
    return tuple((table.layout.stages[row], _list_states(table, row)) for row in range(table.ranks))


def _list_plan_rows(plan: Plan) -> Rows:
    """Return the rows of the plan's table with no more micro-batches than it takes until it only repeats."""
    layout = plan.layout
    microbatches = min(plan.microbatches, STEADY * max(layout.pp, 2))
    if layout.schedule.lower().endswith(".csv"):
        return list_rows(build_table(layout, microbatches))
    return _list_family_rows(layout.schedule, layout.pp, layout.vpp, layout.overlap, microbatches)


@lru_cache(maxsize=256)
def _list_family_rows(schedule: str, pp: int, vpp: int, overlap: bool, microbatches: int) -> Rows:
    return list_rows(build_table(Layout(schedule=schedule, pp=pp, vpp=vpp, overlap=overlap), microbatches))


def relax_plan(plan: Plan) -> Plan:
    """Return the plan with whatever saves memory in place of what it does not state."""
    training, layout, left = plan.training, plan.layout, plan.unstated
    if training.precision != "fp32":
        grads, first, second = (
            "bf16" if f"{name}_dtype" in left else getattr(training, name) for name in ("main_grads", "exp_avg", "exp_avg_sq")
        )
        training = replace(training, main_grads=grads, exp_avg=first, exp_avg_sq=second)
    if "recompute" in left:
        layout = replace(layout, recompute=Recompute("full", method="uniform", layers=1))
    return replace(plan, layout=layout, training=replace(training, fp8_params=training.fp8_params is not False))


def tighten_plan(plan: Plan) -> Plan:
    """Return the plan with twice the tokens in a micro-batch where it does not state them."""
    if not plan.unstated & {"micro_batch_size", "seq_length"}:
        return plan
    return replace(plan, layout=replace(plan.layout, micro_batch_size=2 * plan.layout.micro_batch_size))


class _Case:
    """A plan and an imbalance, with what its stages hold."""

    def __init__(self, plan: Plan, imbalance: float) -> None:
        self.plan = plan
        self.stages = place_layers(plan.model, plan.layout)
        sizes = StageSizes(plan.model, plan.layout, plan.training, imbalance)
        self.parts = [sizes.size(stage) for stage in self.stages]
        self.held = [_join(parts) for parts in self.parts]
        self.parameters = [count_stage(stage, plan.model, plan.layout) for stage in self.stages]

    def take(self, measured: Mapping[int, Measured], ratios: Mapping[int, float]) -> None:
        """Put what was measured in the place of the formula's; ``ratios`` scale what a stage keeps."""
        for stage, one in measured.items():
            self.held[stage] = replace(self.held[stage], kept=self.held[stage].kept * ratios[stage])
            self.parameters[stage] = one.parameters

    def count_static(self, own: Sequence[int]) -> dict[str, float]:
        """Return the bytes that a rank with the stages ``own`` holds all the time, by part."""
        parameters, moe_layers, expert_size = Parameters(), 0, 0.0
        for stage in own:
            parameters += self.parameters[stage]
            for layer in self.stages[stage].layers:
                if layer.moe is not None:
                    moe_layers += 1
                    expert_size = layer.moe.expert.count_parameters(layer.hidden) / self.plan.layout.etp
        static = size_static(parameters, self.plan, moe_layers, expert_size)
        return static | {"buffers": _size_buffers(self.plan, own, self.stages)}


def choose_imbalance(plan: Plan, given: float | None) -> tuple[float, float, float]:
    """Return a rank's tokens over the mean of its expert group: low, likely, high."""
    if given is not None:
        return given, given, given
    groups = plan.layout.ep * plan.layout.etp
    low, likely, high = (1.0, 1.0, 1.0) if plan.training.routing == "forced" or groups == 1 else NATURAL_IMBALANCE
    if "full_iteration" in plan.layout.cuda_graph and not plan.layout.paged_stash:
        # A graph of the whole step has buffers of one size, without a stash by pages for all tokens on one rank.
        high = float(groups)
    return low, likely, high


def _join(parts: dict[str, Held]) -> Held:
    total = Held()
    for one in parts.values():
        total = total.join(one)
    return total


def _estimate_rank(cases: Sequence[_Case], own: Sequence[int], states: _States, rank: int) -> RankMemory:
    totals = []
    for case, allowance, share, spread in zip(cases, FRAMEWORK, FRAMEWORK_SHARE, ACTIVATION_SPREAD, strict=True):
        parts = case.count_static(own)
        static = sum(parts.values())
        parts["framework"] = allowance + share * static
        peak, live, queued, working = _find_peak(states, [case.held[stage] for stage in own])
        counts = list(zip(own, map(float, live), strict=True))
        logits = sum(count * case.parts[stage]["head"].kept for stage, count in counts if "head" in case.parts[stage])
        kept = sum(count * case.held[stage].kept for stage, count in counts)
        parts |= {"activations": kept - logits, "logits": logits, "queued": queued, "working": working}
        totals.append((parts, static + parts["framework"], static + parts["framework"] + peak * spread))
    parts, static, peak = totals[1]
    return RankMemory(rank, parts, static, peak, totals[0][2], totals[2][2], tuple(own))


def _size_buffers(plan: Plan, own: Sequence[int], stages: Sequence[Stage]) -> float:
    """Return the bytes of messages that wait to be sent or read, and of the gradient of a table of words before it is added."""
    layout, training = plan.layout, plan.training
    tokens = layout.micro_batch_size * training.seq_length / layout.cp
    message = size_element(training) * plan.model.hidden * (tokens / layout.tp if layout.sequence_parallel else tokens)
    messages = 2 * message * len(own) if layout.pp > 1 else 0.0
    has_words = any(stages[stage].embedding for stage in own)
    words = BF16 * plan.model.pad_vocab(layout.tp) * plan.model.hidden / layout.tp if has_words else 0.0
    return messages + words


def _find_peak(states: _States, held: Sequence[Held]) -> tuple[float, Array, float, float]:
    """Return the peak of a row's activations, and at it the live micro-batches by chunk, the queued and the working bytes.

    ``held`` is by chunk. At a peak of the same size the first state counts.
    """
    kept, queue, back, ahead = (np.array([getattr(one, name) for one in held]) for name in ("kept", "queued", "working", "ahead"))
    live, queued = states.live @ kept, states.queued @ queue
    working = states.back @ back + states.ahead @ ahead + states.paired[:, 0] * PAIR_SHARE * live
    total = live + queued + working
    best = int(np.argmax(total))
    return float(total[best]), states.live[best], float(queued[best]), float(working[best])
