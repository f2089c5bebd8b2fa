"""What a plan does not state and a step's time depends on: taken as recipes for these GPUs have it, and said.

Source: the performance recipes of Megatron-Bridge, ``src/megatron/bridge/perf_recipes``. In domains of many GPUs they dispatch
by HybridEP and hold attention and router in CUDA graphs. Where they dispatch by HybridEP in MXFP8, one graph holds the whole
step, experts' products are fused, attention is in FP8, and expert communication overlaps. In FP8 with scales of tensors and in
MXFP8 they keep weights in FP8 alone (``src/megatron/bridge/training/mixed_precision.py``, ``fp8_param_gather``) and gradients in
BF16 (``grad_reduce_in_fp32 = False``). A plan that lists Megatron's own flags has Megatron's own defaults.
"""

from dataclasses import dataclass, replace

from counterflow.planner.cluster import Cluster
from counterflow.planner.config import PlanConfig
from counterflow.planner.emission import is_forced
from counterflow.planner.layouts import LISTED, OWN, Layout, Plan, Training
from counterflow.schedule.families import FAMILIES

PARTIAL_GRAPH = ("attn", "moe_router", "moe_preprocess")
WHOLE_GRAPH = ("full_iteration",)
WEIGHTS_IN_FP8 = ("fp8-delayed", "fp8-tensorwise", "mxfp8")
FP8_ATTENTION, FUSED_PERMUTE = "fp8 attention", "hybridep_permute_fusion"


@dataclass(frozen=True)
class Assumed:
    """A plan without gaps, and what its kernels are: attention in FP8, permutations inside the dispatch."""

    plan: Plan
    fp8_attention: bool = False
    fused_permute: bool = False


def assume_unstated(config: PlanConfig, plan: Plan, cluster: Cluster) -> Assumed:
    """Return the plan with what it does not state, and a note for each assumption."""
    words = {word.lower() for word in config.unread_flags}
    notes = [note for note in plan.notes if not any(word in note.lower() for word in (FP8_ATTENTION, FUSED_PERMUTE))]
    if not cluster.gpu.has_format(plan.training.precision):
        notes.append(f"{cluster.gpu.name} has no {plan.training.precision}: trainers refuse it, times are of a wider format")
    if is_forced(plan):
        notes.append("routing is forced, to measure: with --moe-router-force-load-balancing a router's choices are random")
    plan = replace(plan, training=_assume_formats(config, plan, notes))
    layout, has_fp8 = plan.layout, FP8_ATTENTION in words
    if layout.activation_offload_layers:
        notes.append("transfers of offloaded activations are not in the step's time")
        if layout.pp > 1:
            notes.append(f"Megatron offloads activations only with pp 1, and pp {layout.pp} is given")
    if config.layout.cross_entropy_fusion is None:
        layout = replace(layout, cross_entropy_fusion=True)
    if any(layer.moe for layer in plan.model.layers):
        layout = _assume_experts(config, replace(plan, layout=layout), cluster, notes)
        has_fp8 = has_fp8 or (plan.training.precision == "mxfp8" and "full_iteration" in layout.cuda_graph)
    return Assumed(replace(plan, layout=layout, notes=tuple(notes)), has_fp8, FUSED_PERMUTE in words)


def _assume_formats(config: PlanConfig, plan: Plan, notes: list[str]) -> Training:
    training, stated = plan.training, config.training
    is_recipe = training.precision in WEIGHTS_IN_FP8 and not set(config.layout.words) & LISTED
    if not is_recipe or not plan.layout.distributed_optimizer:
        return training
    # Clones do not run under weights in FP8.
    if stated.fp8_param_gather is None and not plan.layout.clones_per_rank:
        training = replace(training, fp8_params=True)
        notes.append(f"fp8_param_gather is not stated: true, as recipes in {training.precision} have it")
    if stated.main_grads_dtype is None:
        training = replace(training, main_grads="bf16")
        notes.append(f"main_grads_dtype is not stated: bf16, as recipes in {training.precision} have it")
    return training


def _assume_experts(config: PlanConfig, plan: Plan, cluster: Cluster, notes: list[str]) -> Layout:
    layout, stated = plan.layout, config.layout
    is_mx = plan.training.precision == "mxfp8"
    if stated.dispatcher is None and layout.ep > 1:
        layout = replace(layout, dispatcher=choose_dispatcher(layout.ep * layout.etp, cluster))
        notes.append(f"dispatcher is not stated: {layout.dispatcher}")
    if stated.cuda_graph is None and is_mx and stated.dispatcher == "hybridep":
        layout = replace(layout, cuda_graph=WHOLE_GRAPH)
        notes.append("cuda_graph is not stated: full_iteration, with fused experts and FP8 attention")
    elif stated.cuda_graph is None and cluster.domain > cluster.gpu.gpus_per_node and may_graph(layout):
        layout = replace(layout, cuda_graph=PARTIAL_GRAPH)
        notes.append(f"cuda_graph is not stated: {','.join(PARTIAL_GRAPH)}")
    if stated.overlap is None and is_mx and "full_iteration" in layout.cuda_graph and can_overlap(layout.pp, layout.schedule):
        layout = replace(layout, overlap=True)
        notes.append("overlap is not stated: on")
    return layout


def may_graph(layout: Layout) -> bool:
    """Tell whether trainers run attention and router of a layout in CUDA graphs; tables and clones have an order of their own."""
    is_recomputed = layout.recompute.granularity == "full" or "moe" in layout.recomputes
    return layout.schedule in OWN and not layout.clones_per_rank and not is_recomputed


def choose_dispatcher(ranks: int, cluster: Cluster) -> str:
    """Return how so many expert-parallel ranks exchange tokens where a plan leaves it open."""
    if cluster.domain > cluster.gpu.gpus_per_node:
        return "hybridep"
    return "alltoall" if cluster.is_local(ranks) else "deepep"


def can_overlap(pp: int, schedule: str) -> bool:
    """Tell whether a schedule has pairs in which expert communication can hide; a single rank has neighbours in time."""
    return pp == 1 or (schedule in FAMILIES and FAMILIES[schedule].pairs)
