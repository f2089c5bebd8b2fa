"""What a search may choose: sizes, sharding, schedules, of all that a plan leaves open; and what no trainer would run of it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from counterflow.planner.assumptions import Assumed, assume_unstated
from counterflow.planner.cluster import Cluster
from counterflow.planner.config import PlanConfig
from counterflow.planner.emission import find_refusal, needs_table
from counterflow.planner.layouts import OWN, PLAIN_LOOPED, PLAIN_STRAIGHT, Plan, complete_plan
from counterflow.planner.models import ModelShape
from counterflow.schedule.families import FAMILIES
from counterflow.schedule.layouts import LOOPED, STRAIGHT

CONTEXT_FROM = 16384
TENSOR = (1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4)
CHUNKS = (2, 4, 8)
CLONES = (0, 2)
MOST_PIPELINE = 64
SELECTIVE = "moe_act,layernorm,mla_up_proj"


class Sharding(NamedTuple):
    """What is sharded over data-parallel ranks: optimizer state (ZeRO-1), or weights and gradients too (FSDP)."""

    distributed_optimizer: bool
    fsdp: bool


SHARDINGS = (Sharding(True, False), Sharding(False, False), Sharding(True, True))
Fields = dict[str, Any]


def list_sizes(config: PlanConfig, model: ModelShape, cluster: Cluster, gpus: int) -> Iterator[Fields]:
    """Yield all sizes that are not given: tp pp cp ep etp, micro-batch, recomputation and clones."""
    given = config.layout
    experts = next((layer.moe.experts for layer in model.layers if layer.moe is not None), 1)
    seq = config.training.seq_length or 4096
    tps = _pick(given.tp, [tp for tp in TENSOR if tp <= cluster.domain])
    pps = _pick(given.pp, [pp for pp in _divide(gpus) if pp <= min(len(model.layers) + 2, MOST_PIPELINE)])
    cps = _pick(given.cp, [1, 2, 4, 8, 16] if seq >= CONTEXT_FROM else [1])
    eps = _pick(given.ep, _divide(experts) if experts > 1 else [1])
    recomputes = [given.recompute] if given.recompute is not None else ["none", SELECTIVE, "full"]
    is_uneven = config.training.routing not in (None, "forced") and experts > 1
    clones = _pick(given.clones_per_rank, list(CLONES) if is_uneven else [0])
    batches = _pick(given.micro_batch_size, list(MICRO_BATCHES))
    for tp, pp, cp, ep in product(tps, pps, cps, eps):
        whole = gpus // (tp * pp * cp)
        if gpus % (tp * pp * cp) or (given.dp is not None and whole != given.dp):
            continue
        for etp in _pick(given.etp, [one for one in TENSOR if tp % one == 0] if experts > 1 else [1]):
            if (tp * cp * whole) % (ep * etp):
                continue
            for batch, recompute, clone in product(batches, recomputes, clones):
                if not (clone and ep == 1):
                    yield {
                        "tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "micro_batch_size": batch, "recompute": recompute,
                        "clones_per_rank": clone,
                    }  # fmt: skip


def _pick(given: int | None, others: list[int]) -> list[int]:
    return others if given is None else [given]


def _divide(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0] if number < 2**16 else [2**n for n in range(17)]


def list_shardings(config: PlanConfig) -> list[Sharding]:
    """Return the ways to shard over data-parallel ranks that a plan leaves open."""
    given = config.layout
    optimizer, fsdp = given.distributed_optimizer, None if given.fsdp is None else bool(given.fsdp)
    open_ones = [one for one in SHARDINGS if optimizer in (None, one.distributed_optimizer) and fsdp in (None, one.fsdp)]
    return open_ones or [Sharding(bool(optimizer), bool(fsdp))]


def list_schedules(config: PlanConfig, fields: Fields) -> Iterator[Fields]:
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


def make_straight(fields: Fields) -> Fields:
    """Return a choice of sizes under the plain schedule of one chunk a rank."""
    return {**fields, "schedule": PLAIN_STRAIGHT, "vpp": None, "overlap": False}


def complete_choice(config: PlanConfig, fields: Fields, cluster: Cluster, model: ModelShape | None = None) -> Assumed:
    """Return the complete plan of a choice; what the search chose is stated."""
    given = {name: value for name, value in fields.items() if value is not None}
    chosen = config.replace_layout(**given, **({"vpp": None} if fields.get("vpp") is None else {}))
    assumed = assume_unstated(chosen, complete_plan(chosen, model), cluster)
    # The routing is the data's: that a plan leaves it open decides what its flags ask for.
    return replace(assumed, plan=replace(assumed.plan, unstated=assumed.plan.unstated & {"routing"}))


def explain_refusal(plan: Plan) -> str:
    """Return why a plan is not worth an estimate: its trainer refuses it, or another plan is surely better; else nothing."""
    layout = plan.layout
    if refusal := find_refusal(plan):
        return refusal
    if not layout.distributed_optimizer and layout.dp * layout.cp > 1 and layout.overlap_param_gather:
        return "the same with the distributed optimizer needs less memory and is as fast"
    return ""


# Kinds of layouts of which a search finds the best one, whatever is faster: Megatron's interleaved schedule as it is, and what
# needs counterflow, a table or clones.
LOOPED_KIND, OUR_KIND = "looped", "ours"
KINDS = (LOOPED_KIND, OUR_KIND)


def find_kind(plan: Plan) -> str | None:
    """Return the kind of a plan's layout, None for one of neither."""
    layout = plan.layout
    if needs_table(plan) or layout.clones_per_rank:
        return OUR_KIND
    return LOOPED_KIND if layout.schedule == PLAIN_LOOPED and not layout.fsdp else None


def list_kinds(config: PlanConfig) -> list[str]:
    """Return the kinds that a plan leaves open."""
    given, schedule = config.layout, config.layout.schedule
    if given.pp == 1:
        return []
    may_loop = schedule in (None, PLAIN_LOOPED) and not given.clones_per_rank and not given.fsdp
    may_ours = (schedule not in OWN or bool(given.clones_per_rank)) and not given.fsdp
    return [LOOPED_KIND] * may_loop + [OUR_KIND] * may_ours


def name_fields(fields: Fields) -> str:
    """Return a layout in a few words."""
    names = {"micro_batch_size": "mbs"}
    words = [f"{names.get(name, name)} {value}" for name, value in fields.items() if _is_telling(name, value)]
    words += ["fsdp"] * bool(fields.get("fsdp")) + ["overlap"] * bool(fields.get("overlap"))
    return " ".join([*words, *["no distributed optimizer"] * (fields.get("distributed_optimizer") is False)])


def _is_telling(name: str, value: Any) -> bool:
    if name in ("cp", "etp", "vpp", "clones_per_rank") and value in (None, 0, 1):
        return False
    return value not in (None, False, True, "none") or (name in ("tp", "pp", "ep", "micro_batch_size") and value == 1)
