"""How a model lies on GPUs: sizes of all parallelisms, completed from a plan, checked, and the layers of each stage."""

import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from counterflow.bounds import show
from counterflow.errors import PlanError
from counterflow.planner.config import PlanConfig, read_recompute, suggest
from counterflow.planner.models import MLA, LayerShape, ModelShape, build_model
from counterflow.schedule.families import FAMILIES, build
from counterflow.schedule.files import read_csv
from counterflow.schedule.layouts import BIDIRECTIONAL, LOOPED, V
from counterflow.schedule.table import ScheduleTable

MOST_STAGES = 4096
with (Path(__file__).parent / "families.toml").open("rb") as _file:
    _FAMILIES = tomllib.load(_file)
# Schedules of other trainers, and the family here that is most like them.
NEAREST: dict[str, str] = _FAMILIES["nearest"]
PLAIN_STRAIGHT: str = _FAMILIES["default"]["straight"]
PLAIN_LOOPED: str = _FAMILIES["default"]["looped"]
# Megatron runs these without a plugin.
OWN = (PLAIN_STRAIGHT, PLAIN_LOOPED)
AUTO = "auto"
# Words in ``layout.flags`` of whoever lists Megatron's flags.
LISTED = frozenset({"sp", "dist_optimizer", "tied", "untied", "swiglu"})


@dataclass(frozen=True)
class Recompute:
    """What a backward pass computes again: nothing (``granularity`` None), ``modules`` (``selective``), or layers (``full``).

    ``layers`` of ``full``: by ``method`` ``uniform`` layers between two kept inputs, by ``block`` how many of a chunk.
    """

    granularity: str | None = None
    modules: frozenset[str] = frozenset()
    method: str | None = None
    layers: int | None = None

    def __str__(self) -> str:
        if self.granularity == "full":
            return f"full,{self.method},{self.layers}"
        return ",".join(sorted(self.modules)) or "none"


@dataclass(frozen=True)
class Training:
    """What a step computes: tokens, batch, number formats. ``routing``: ``forced``, ``natural`` or a file.

    ``fp8_params``: weights are kept in FP8 alone (``--fp8-param-gather``); None where that is not stated.
    """

    seq_length: int
    global_batch_size: int
    precision: str = "bf16"
    routing: str = "forced"
    main_grads: str = "fp32"
    main_params: str = "fp32"
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"
    fp8_params: bool | None = None


@dataclass(frozen=True)
class Layout:
    """All that is chosen about a run: sizes, schedule, and flags that change its time or memory.

    ``tp``, ``cp``, ``dp``, ``pp`` multiply to the number of GPUs; ``ep`` x ``etp`` divides ``tp`` x ``cp`` x ``dp``. ``vpp`` is
    the number of model chunks on each pipeline rank, ``schedule`` the name of a family or a table ``FILE.csv``,
    ``asked_schedule`` what was asked for. The last five say how layers are split; see `place_layers`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    micro_batch_size: int = 1
    schedule: str = PLAIN_STRAIGHT
    asked_schedule: str | None = None
    overlap: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    dispatcher: str = "alltoall"
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    fsdp: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    optimizer_offload: float = 0.0
    activation_offload_layers: int = 0
    clones_per_rank: int = 0
    cuda_graph: tuple[str, ...] = ()
    fused_attention: bool = True
    cross_entropy_fusion: bool = False
    expandable_segments: bool = False
    paged_stash: bool = False
    max_connections: int | None = None
    pipeline_layout: str | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def stages(self) -> int:
        """Number of stages of the model."""
        return self.pp * self.vpp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts: over these their optimizer state is sharded."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def local(self) -> "Layout":
        """The layout with only what the time of a layer on one GPU depends on: no pipeline, no replicas."""
        return replace(
            self, pp=1, vpp=1, dp=1, schedule=PLAIN_STRAIGHT, asked_schedule=None, overlap=False, distributed_optimizer=True,
            fsdp=False, overlap_grad_reduce=True, overlap_param_gather=True, optimizer_offload=0.0, clones_per_rank=0,
            pipeline_layout=None, first_stage_layers=None, last_stage_layers=None, account_for_embedding=False,
            account_for_loss=False,
        )  # fmt: skip

    @property
    def recomputes(self) -> frozenset[str]:
        """The modules that are recomputed selectively."""
        return self.recompute.modules


@dataclass(frozen=True)
class Plan:
    """A completed plan; ``notes`` say in words what was not stated and is assumed.

    ``unstated`` are keys of the plan that were left out: what they might be widens the interval of an estimate.
    """

    model: ModelShape
    training: Training
    layout: Layout
    notes: tuple[str, ...] = ()
    unstated: frozenset[str] = frozenset()

    @property
    def microbatches(self) -> int:
        """Micro-batches of one pipeline in a step."""
        return self.training.global_batch_size // (self.layout.dp * self.layout.micro_batch_size)


@dataclass(frozen=True)
class Stage:
    """One stage: its decoder layers by number and shape, and whether it holds the embedding, the head, and ``mtp`` MTP layers."""

    numbers: tuple[int, ...]
    layers: tuple[LayerShape, ...]
    embedding: bool = False
    head: bool = False
    mtp: int = 0


def complete_plan(config: PlanConfig, model: ModelShape | None = None) -> Plan:
    """Return the plan with everything that was left out filled in, and said; raises `PlanError` where sizes do not fit.

    ``model`` is that of the plan, where it was built before.
    """
    model = build_model(config.model) if model is None else model
    notes = list(model.assumed)
    layout = complete_layout(config, model, notes)
    training = _complete_training(config, layout, notes)
    layout = complete_split(model, layout, notes)
    notes += [f"flag {show(word)} is not modelled" for word in config.unread_flags]
    left = {
        key for section in (config.training, config.layout) for key in type(section).model_fields if getattr(section, key) is None
    }
    plan = Plan(model, training, layout, tuple(notes), frozenset(left))
    check_plan(plan)
    return plan


def _complete_training(config: PlanConfig, layout: Layout, notes: list[str]) -> Training:
    given = config.training
    batch = layout.dp * layout.micro_batch_size
    size = given.global_batch_size
    if size is None:
        size = batch * max(4 * layout.pp, 8)
        notes.append(f"global_batch_size is not stated: {size}, {max(4 * layout.pp, 8)} micro-batches for each pipeline")
    seq = _choose(given.seq_length, 4096, "seq_length", notes)
    precision = _choose(given.precision, "bf16", "precision", notes)
    routing = _choose(given.routing, "forced", "routing", notes)
    return Training(
        seq, size, precision, routing, given.main_grads_dtype or "fp32", given.main_params_dtype or "fp32",
        given.exp_avg_dtype or "fp32", given.exp_avg_sq_dtype or "fp32",
        given.fp8_param_gather,
    )  # fmt: skip


def _choose[T](given: T | None, default: T, name: str, notes: list[str]) -> T:
    if given is not None:
        return given
    notes.append(f"{name} is not stated: {default}")
    return default


def complete_layout(config: PlanConfig, model: ModelShape, notes: list[str]) -> Layout:
    """Return the layout of a plan with defaults for what is left out; a line in ``notes`` for each that matters."""
    given = config.layout
    pp, tp = _choose(given.pp, 1, "pp", notes), _choose(given.tp, 1, "tp", notes)
    cp = given.cp or 1
    experts = next((layer.moe.experts for layer in model.layers if layer.moe is not None), 0)
    ep = given.ep or 1
    if experts and given.ep is None:
        notes.append("ep is not stated: 1")
    etp = given.etp or 1
    if experts and tp > 1 and given.etp is None:
        notes.append("etp is not stated: 1")
    dp = _complete_dp(config, tp, pp, cp, ep * etp, notes)
    schedule, vpp = _complete_schedule(config, pp, notes)
    granularity, modules, method, layers = read_recompute(given.recompute)
    modules = _keep_own(modules, model, notes)
    granularity = "selective" if modules else None if granularity == "selective" else granularity
    graph = given.cuda_graph or ()
    # Whoever lists Megatron's flags lists these two, which its command line has off.
    listed = sorted(set(given.words) & LISTED)
    is_default = not listed
    if listed and given.distributed_optimizer is None and dp * cp > 1:
        notes.append(
            f"no distributed optimizer: flags list Megatron's ({', '.join(listed)}) without dist_optimizer; add it, or "
            f"distributed_optimizer: true"
        )
    return Layout(
        tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, dp=dp,
        micro_batch_size=_choose(given.micro_batch_size, 1, "micro_batch_size", notes),
        schedule=schedule, asked_schedule=given.schedule,
        overlap=bool(given.overlap) and _can_overlap(schedule, pp, ep, experts > 0, notes),
        recompute=Recompute(granularity, modules, method, layers),
        dispatcher=given.dispatcher or "alltoall",
        sequence_parallel=tp > 1 and (is_default or experts > 0 if given.sequence_parallel is None else given.sequence_parallel),
        distributed_optimizer=is_default if given.distributed_optimizer is None else given.distributed_optimizer,
        fsdp=bool(given.fsdp),
        overlap_grad_reduce=given.overlap_grad_reduce is not False,
        overlap_param_gather=given.overlap_param_gather is not False,
        optimizer_offload=given.optimizer_offload or 0.0,
        activation_offload_layers=given.activation_offload_layers or 0,
        clones_per_rank=given.clones_per_rank or 0,
        cuda_graph=tuple(re.split(r"[,\s]+", graph)) if isinstance(graph, str) else tuple(graph),
        fused_attention=given.fused_attention is not False,
        cross_entropy_fusion=bool(given.cross_entropy_fusion),
        expandable_segments=bool(given.expandable_segments),
        paged_stash=bool(given.paged_stash),
        max_connections=given.max_connections,
        pipeline_layout=given.pipeline_model_parallel_layout,
        first_stage_layers=given.num_layers_in_first_pipeline_stage,
        last_stage_layers=given.num_layers_in_last_pipeline_stage,
        account_for_embedding=bool(given.account_for_embedding_in_pipeline_split),
        account_for_loss=bool(given.account_for_loss_in_pipeline_split),
    )  # fmt: skip


def _keep_own(modules: frozenset[str], model: ModelShape, notes: list[str]) -> frozenset[str]:
    """Return the modules that the model has; a line in ``notes`` for others."""
    has = {"core_attn", "layernorm"}
    has |= {"mlp"} if any(layer.ffn is not None for layer in model.layers) else set()
    has |= {"moe", "moe_act"} if any(layer.moe is not None for layer in model.layers) else set()
    has |= {"shared_experts"} if any(layer.moe is not None and layer.moe.shared is not None for layer in model.layers) else set()
    has |= {"mla_up_proj"} if any(layer.attention.kind == MLA for layer in model.layers) else set()
    if lacking := sorted(modules - has):
        notes.append(f"recompute of {', '.join(lacking)} is left out: the model has no such part")
    return modules & has


def count_gpus(config: PlanConfig) -> int | None:
    """Return the number of GPUs that a plan's cluster states, None where it does not."""
    cluster = config.cluster
    if cluster.nodes is None:
        return cluster.gpus
    gpus = cluster.nodes * (cluster.gpus_per_node or 8)
    if cluster.gpus not in (None, gpus):
        raise PlanError(f"cluster.gpus {cluster.gpus} given, and nodes x gpus_per_node is {gpus}: drop one")
    return gpus


def _complete_dp(config: PlanConfig, tp: int, pp: int, cp: int, experts: int, notes: list[str]) -> int:
    gpus, given = count_gpus(config), config.layout.dp
    if gpus is None:
        # The fewest replicas that hold the experts.
        dp = given or next(dp for dp in range(1, experts + 1) if tp * cp * dp % experts == 0)
        notes.append(f"the number of GPUs is not stated: {tp * cp * pp * dp}")
        return dp
    if gpus % (tp * pp * cp):
        raise PlanError(f"tp {tp} x pp {pp} x cp {cp} does not divide {gpus} GPUs: give sizes whose product divides it")
    dp = gpus // (tp * pp * cp)
    if given not in (None, dp):
        raise PlanError(
            f"layout.dp {given} given, and {gpus} GPUs / (tp {tp} x pp {pp} x cp {cp}) is {dp}: drop dp, or change a size"
        )
    return dp


def _complete_schedule(config: PlanConfig, pp: int, notes: list[str]) -> tuple[str, int]:
    """Return the family and the number of chunks on each rank."""
    given, asked = config.layout, config.layout.schedule
    stages = None if given.pipeline_model_parallel_layout is None else len(parse_layout(given.pipeline_model_parallel_layout))
    if stages is not None and (stages % pp or given.vpp not in (None, stages // pp)):
        raise PlanError(
            f"pipeline_model_parallel_layout has {stages} stages, which pp {pp}{f' x vpp {given.vpp}' if given.vpp else ''} does "
            f"not fit: stages are pp x vpp"
        )
    vpp = given.vpp or (stages // pp if stages else None)
    if asked is not None and asked.lower().endswith(".csv"):
        return asked, vpp or 1
    plain = PLAIN_LOOPED if (vpp or 1) > 1 else PLAIN_STRAIGHT
    name = plain if asked in (None, AUTO) else re.sub(r"[\s_]+", "-", asked.strip().lower())
    if asked == AUTO:
        notes.append(
            f"schedule auto is planned as {plain}, whose flags follow: --cf-schedule auto measures a run's first steps and "
            f"searches a table, as plan search does where schedule is left out"
        )
    if name in NEAREST:
        notes.append(f"schedule {asked} is planned as {NEAREST[name]}, the nearest family")
        name = NEAREST[name]
    if name not in FAMILIES:
        allowed = (*FAMILIES, *NEAREST)
        raise PlanError(
            f"layout.schedule {show(asked)} is not known; allowed: {', '.join(FAMILIES)}{suggest(str(asked), allowed)}"
        )
    chunks = {V: 2, BIDIRECTIONAL: 2, LOOPED: vpp or 2}.get(FAMILIES[name].layout, 1)
    if pp == 1 and chunks > 1 or name == PLAIN_LOOPED and chunks == 1:
        # One rank, or one chunk, leaves nothing to interleave.
        if asked not in (None, AUTO, PLAIN_STRAIGHT):
            notes.append(
                f"schedule {asked} is planned as {PLAIN_STRAIGHT}: {'pp' if pp == 1 else 'vpp'} 1 leaves it nothing to do"
            )
        return PLAIN_STRAIGHT, 1
    if name == PLAIN_STRAIGHT and (vpp or 1) > 1:
        notes.append(f"schedule {asked} is planned as {PLAIN_LOOPED}, which Megatron runs with vpp {vpp}: drop vpp for {name}")
        return PLAIN_LOOPED, vpp or 1
    if vpp is not None and vpp != chunks:
        raise PlanError(f"layout.vpp {vpp} given; {name} has {chunks} model chunk{'s' * (chunks > 1)} on a rank: drop vpp")
    if vpp is None and FAMILIES[name].layout == LOOPED:
        notes.append("vpp is not stated: 2")
    return name, chunks


def _can_overlap(schedule: str, pp: int, ep: int, has_experts: bool, notes: list[str]) -> bool:
    """Return whether a schedule has pairs whose expert communication can hide; a line in ``notes`` where it has not."""
    reasons = []
    family = FAMILIES.get(schedule)
    if pp > 1 and family is not None and not (family.pairs or "ep_overlap" in family.options):
        able = [one.name for one in FAMILIES.values() if one.pairs or "ep_overlap" in one.options]
        reasons.append(f"schedule {schedule} has no pairs of an F and a B ({', '.join(able)} have)")
    if not has_experts:
        reasons.append("the model has no experts that exchange tokens")
    elif ep == 1:
        reasons.append("ep is 1, so that no tokens are exchanged")
    if reasons:
        notes.append(f"overlap is planned off: {'; '.join(reasons)}")
    return not reasons


def complete_split(model: ModelShape, layout: Layout, notes: list[str]) -> Layout:
    """Let embedding and head count as layers, or deal layers unevenly, where only that divides and nothing was asked for."""
    asked = (layout.pipeline_layout, layout.first_stage_layers, layout.last_stage_layers)
    layers, stages = len(model.layers), layout.stages
    if any(one is not None for one in asked) or layout.account_for_embedding or layout.account_for_loss or layers % stages == 0:
        return layout
    if stages > layers + 2 + model.mtp_layers or stages > MOST_STAGES:
        raise PlanError(
            f"pp {layout.pp} x vpp {layout.vpp} makes {stages} stages, and the model has {layers} layers: give fewer stages"
        )
    if (layers + 2) % stages == 0:
        notes.append("the layers divide into stages with embedding and head counted as layers")
        return _replace(layout, account_for_embedding=True, account_for_loss=True)
    if (layers + 1) % stages == 0:
        notes.append("the layers divide into stages with the head counted as a layer")
        return _replace(layout, account_for_loss=True)
    text = deal_layers(layers, stages, model.mtp_layers)
    notes.append(f"{layers} layers do not divide into {stages} stages: {text}")
    return _replace(layout, pipeline_layout=text)


def _replace(layout: Layout, **fields: object) -> Layout:
    return replace(layout, **fields)  # type: ignore[arg-type]


def deal_layers(layers: int, stages: int, mtp: int = 0) -> str:
    """Return a layout, as Megatron writes it, that deals layers, embedding, MTP and head as evenly as can be; ends get fewer."""
    units = layers + mtp + 2
    small, more = divmod(units, stages)
    # From the middle outwards: the ends hold what is not a layer.
    order = sorted(range(stages), key=lambda stage: (abs(2 * stage - (stages - 1)), -stage))
    sizes = [small + (stage in order[:more]) for stage in range(stages)]
    pieces = ["E" + "t" * layers + "m" * mtp + "L"]
    text, start = [], 0
    for size in sizes:
        text.append(pieces[0][start : start + size])
        start += size
    return "|".join(text)


def parse_layout(text: str) -> list[str]:
    """Return the stages of a ``pipeline_model_parallel_layout``, a string of ``E t m L`` each: ``Et|(tt|)*30mL``.

    Raises `PlanError` for a string that Megatron would not read.
    """
    unrolled = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d{1,4})", r"(.)\*(\d{1,4})"):
        unrolled = re.sub(pattern, lambda match: match[1] * int(match[2]), unrolled)
        if len(unrolled) > 10 * MOST_STAGES:
            raise PlanError(f"pipeline_model_parallel_layout {show(text)} is longer than {10 * MOST_STAGES} layers")
    stages = unrolled.split("|")
    flat = "".join(stages)
    if set(flat) - set("EtmL") or not re.fullmatch(r"Et*m*L", flat):
        raise PlanError(
            f"pipeline_model_parallel_layout {show(text)} given; allowed: E (embedding), t (layers), m (MTP), L (loss), with | "
            f"between stages and (…)*N, like Et|(tt|)*30mL"
        )
    return stages


def place_layers(model: ModelShape, layout: Layout) -> tuple[Stage, ...]:
    """Return what each stage holds, in the order in which a micro-batch passes them; raises `PlanError` where it does not divide.

    Stage s is on pipeline rank s mod pp in straight and looped layouts; of others `counterflow.schedule.Layout` knows the rank.
    """
    counts, mtp = _count_layers(model, layout)
    if sum(counts) != len(model.layers):
        raise PlanError(f"the stages hold {sum(counts)} layers and the model has {len(model.layers)}: change the split")
    stages, start = [], 0
    for index, count in enumerate(counts):
        numbers = tuple(range(start, start + count))
        start += count
        is_last = index == layout.stages - 1
        stages.append(Stage(numbers, tuple(model.layers[number] for number in numbers), index == 0, is_last, mtp[index]))
    return tuple(stages)


def _count_layers(model: ModelShape, layout: Layout) -> tuple[list[int], list[int]]:
    """Return decoder layers and MTP layers by stage."""
    stages, layers = layout.stages, len(model.layers)
    mtp = [0] * (stages - 1) + [model.mtp_layers]
    if layout.pipeline_layout is not None:
        parts = parse_layout(layout.pipeline_layout)
        if len(parts) != stages:
            raise PlanError(
                f"pipeline_model_parallel_layout has {len(parts)} stages, and pp {layout.pp} x vpp {layout.vpp} is {stages}"
            )
        own = [part.count("m") for part in parts]
        if sum(own) not in (0, model.mtp_layers):
            raise PlanError(f"pipeline_model_parallel_layout has {sum(own)} MTP layers and the model has {model.mtp_layers}")
        return [part.count("t") for part in parts], own if sum(own) else mtp
    if layout.first_stage_layers is not None or layout.last_stage_layers is not None:
        return _split_ends(layers, layout), mtp
    extra = layout.account_for_embedding + layout.account_for_loss
    if stages > layers + extra:
        raise PlanError(
            f"pp {layout.pp} x vpp {layout.vpp} makes {stages} stages, and the model has {layers} layers: give fewer stages"
        )
    if (layers + extra) % stages:
        raise PlanError(
            f"{layers} layers{f' and {extra} that count as layers' if extra else ''} do not divide into pp {layout.pp} x vpp "
            f"{layout.vpp} = {stages} stages: change pp or vpp, or give pipeline_model_parallel_layout "
            f"{deal_layers(layers, stages, model.mtp_layers)}"
        )
    counts = [(layers + extra) // stages] * stages
    counts[0] -= layout.account_for_embedding
    counts[-1] -= layout.account_for_loss
    return counts, mtp


def _split_ends(layers: int, layout: Layout) -> list[int]:
    """Return layers by stage where the first or the last pipeline rank has a number of its own, over all of its chunks."""
    first, last = layout.first_stage_layers, layout.last_stage_layers
    rest = layers - (first or 0) - (last or 0)
    middle = layout.pp - (first is not None) - (last is not None)
    if rest < 0 or (middle and rest % middle) or (not middle and rest):
        raise PlanError(
            f"{rest} layers are left for {middle} pipeline ranks between the ends: change the layers of the ends, or pp"
        )
    by_rank = [rest // middle if middle else 0] * layout.pp
    by_rank[0] = by_rank[0] if first is None else first
    by_rank[-1] = by_rank[-1] if last is None else last
    if any(count % layout.vpp for count in by_rank):
        raise PlanError(
            f"{sorted(set(by_rank))} layers on a pipeline rank do not divide into vpp {layout.vpp} chunks: change vpp or the ends"
        )
    return [by_rank[stage % layout.pp] // layout.vpp for stage in range(layout.stages)]


def check_plan(plan: Plan) -> None:
    """Raise `PlanError` for sizes that do not divide; the message says which, and what to change."""
    model, layout, training = plan.model, plan.layout, plan.training
    if layout.stages > MOST_STAGES:
        raise PlanError(f"pp {layout.pp} x vpp {layout.vpp} makes {layout.stages} stages; allowed: at most {MOST_STAGES}")
    _check_batch(plan)
    offloaded, most = layout.activation_offload_layers, len(model.layers) - 1
    _require(
        offloaded <= most,
        f"activation_offload_layers {offloaded} given; allowed: 0 to {most}, less than the model's layers",
    )
    shards = layout.cp * (2 if layout.cp > 1 else 1) * (layout.tp if layout.sequence_parallel else 1)
    _require(
        training.seq_length % shards == 0,
        f"seq_length {training.seq_length} given, cp {layout.cp} and tp {layout.tp} cut it in {shards} parts: give a multiple",
    )
    for layer in {id(one): one for one in model.layers}.values():
        _check_layer(layer, layout)
    _require(
        layout.dp * layout.tp * layout.cp % (layout.ep * layout.etp) == 0,
        f"ep {layout.ep} x etp {layout.etp} does not divide tp {layout.tp} x cp {layout.cp} x dp {layout.dp}: "
        f"change ep, or give more GPUs",
    )
    if training.precision == "fp8-delayed" and (modules := layout.recomputes & {"layernorm", "moe_act"}):
        raise PlanError(
            f"recompute {', '.join(sorted(modules))} given with precision fp8-delayed, which Megatron refuses: "
            f"give another precision, or leave it out"
        )
    place_layers(model, layout)


def _check_batch(plan: Plan) -> None:
    layout, size = plan.layout, plan.training.global_batch_size
    batch = layout.dp * layout.micro_batch_size
    _require(
        size % batch == 0,
        f"global_batch_size {size} does not divide by micro_batch_size {layout.micro_batch_size} x dp {layout.dp} = {batch}: "
        f"give a multiple of it",
    )


def _check_layer(layer: LayerShape, layout: Layout) -> None:
    attention, moe, tp, etp = layer.attention, layer.moe, layout.tp, layout.etp
    heads, groups = attention.heads, attention.kv_heads
    _require(heads % tp == 0, f"tp {tp} does not divide {heads} attention heads: give a divisor")
    _require(groups % tp == 0 or tp % groups == 0, f"tp {tp} and {groups} query groups: one has to divide the other")
    if layer.ffn is not None:
        _require(layer.ffn.size % tp == 0, f"tp {tp} does not divide ffn_hidden_size {layer.ffn.size}: give a divisor")
    if moe is not None:
        _require(moe.experts % layout.ep == 0, f"ep {layout.ep} does not divide {moe.experts} experts: give a divisor")
        clones, others = layout.clones_per_rank, moe.experts - moe.experts // layout.ep
        allowed = f"0 to {others}, the experts of other ranks" if others else "0, since ep 1 has all experts on every rank"
        _require(clones <= others, f"clones_per_rank {clones} given; allowed: {allowed}")
        size = moe.expert.size
        _require(size % etp == 0, f"etp {etp} does not divide moe_ffn_hidden_size {size}: give a divisor")


def _require(is_right: bool, message: str) -> None:
    if not is_right:
        raise PlanError(message)


def build_table(layout: Layout, microbatches: int) -> ScheduleTable:
    """Return the schedule table that the layout would run; raises `ScheduleError` for sizes that its family does not allow.

    The table of ``dualpipe`` spans two replicas: 2 pp ranks, of which r and 2 pp - 1 - r hold the stages of pipeline rank r.
    """
    if layout.schedule.lower().endswith(".csv"):
        return read_csv(Path(layout.schedule))
    family = FAMILIES[layout.schedule]
    options: dict[str, object] = {}
    if "vpp" in family.options:
        options["vpp"] = layout.vpp
    if "ep_overlap" in family.options and layout.overlap:
        options["ep_overlap"] = True
    return build(layout.schedule, layout.pp * family.replicas, microbatches * family.replicas, **options)
