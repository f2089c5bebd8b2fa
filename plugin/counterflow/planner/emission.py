"""A plan as what the trainers read: flags of Megatron-LM, and DeepSpeed's JSON.

Data, tokenizer and learning rates stay the user's, and so does what changes neither time nor memory: the base and scaling of
rotary embeddings, epsilons, score function and scaling of the router. Flags of schedules that Megatron has itself are
Megatron's; others are counterflow's.
"""

from collections.abc import Iterable
from typing import Any

from counterflow.errors import PlanError
from counterflow.planner.layouts import OWN, PLAIN_STRAIGHT, Layout, Plan, place_layers
from counterflow.planner.models import LINEAR, MLA, LayerShape, ModelShape
from counterflow.schedule.families import FAMILIES
from counterflow.schedule.layouts import BIDIRECTIONAL, LOOPED, V

# Symbols of HybridModel's pattern: attention by kind, a dense feed-forward, experts.
_SYMBOLS = {MLA: "+", LINEAR: "G"}
_ATTENTION, _DENSE, _EXPERTS = "*", "-", "E"
_WHOLE = "full_iteration"


def emit_megatron(plan: Plan, hybrid: bool = False) -> list[str]:
    """Return the flags of a Megatron launch script for a plan; for a HybridModel with ``hybrid``.

    Raises `PlanError` for a plan that Megatron, or counterflow on it, refuses to run.
    """
    model, layout = plan.model, plan.layout
    if refusal := find_refusal(plan, hybrid):
        raise PlanError(refusal)
    groups = [
        _emit_model(model, hybrid),
        _emit_experts(model, layout),
        _emit_pattern(plan) if hybrid else _emit_split(plan),
        _emit_sizes(plan),
        _emit_precision(plan),
        _emit_recompute(layout),
        _emit_rest(plan),
        _emit_schedule(plan, hybrid),
    ]
    return [str(word) for group in groups for word in group]


def _pick(model: ModelShape, is_wanted: Any) -> LayerShape | None:
    return next((layer for layer in model.layers if is_wanted(layer)), None)


def _emit_model(model: ModelShape, hybrid: bool) -> Iterable[Any]:
    full = _pick(model, lambda layer: layer.attention.kind != LINEAR) or model.layers[0]
    dense = _pick(model, lambda layer: layer.ffn is not None)
    attention, expert = full.attention, full.moe
    some = dense.ffn if dense is not None and dense.ffn is not None else expert.expert if expert is not None else None
    assert some is not None, "a layer has a feed-forward"
    if not hybrid:
        yield from ("--num-layers", len(model.layers))
    yield from ("--hidden-size", model.hidden, "--num-attention-heads", attention.heads, "--ffn-hidden-size", some.size)
    yield from ("--normalization", "LayerNorm" if full.norm_bias else "RMSNorm")
    yield from ("--vocab-size", model.vocab, "--make-vocab-size-divisible-by", model.vocab_multiple)
    yield from ("--attention-dropout", 0, "--hidden-dropout", 0)
    yield from ["--swiglu"] * some.gated
    yield from ["--disable-bias-linear"] * (not some.bias)
    yield from ["--add-qkv-bias"] * (attention.qkv_bias and not attention.out_bias)
    yield from ["--qk-layernorm"] * attention.qk_norm
    yield from ["--untie-embeddings-and-output-weights"] * (not model.tied)
    yield from ("--position-embedding-type", "learned_absolute" if model.positions else "rope")
    if attention.kind == MLA:
        yield from ("--multi-latent-attention", "--kv-lora-rank", attention.kv_lora, "--qk-head-dim", attention.qk_nope)
        yield from ("--qk-pos-emb-head-dim", attention.rope_dim, "--v-head-dim", attention.v_head_dim)
        yield from ("--q-lora-rank", attention.q_lora) if attention.q_lora else ()
    else:
        yield from ("--kv-channels", attention.head_dim)
        if attention.kv_heads != attention.heads:
            yield from ("--group-query-attention", "--num-query-groups", attention.kv_heads)
    yield from _emit_attention(model, full)
    if model.mtp_layers and not hybrid:
        yield from ("--mtp-num-layers", model.mtp_layers)


def _emit_attention(model: ModelShape, full: LayerShape) -> Iterable[Any]:
    """Yield what some attentions have besides: windows, sinks, gates, and layers with linear attention."""
    yield from ["--attention-output-gate"] * full.attention.output_gate
    yield from ("--softmax-type", "learnable") if full.attention.sinks else ()
    windows = [layer.attention.window for layer in model.layers]
    if (size := next(filter(None, windows), None)) is not None:
        yield from ("--window-size", f"{size},0")
        if None in windows:
            yield from ("--window-attn-skip-freq", windows.index(None) + 1)
    linear = [layer.attention.kind == LINEAR for layer in model.layers]
    if any(linear):
        own = model.layers[linear.index(True)].attention
        yield from ("--experimental-attention-variant", "gated_delta_net", "--linear-attention-freq", linear.index(False) + 1)
        yield from ("--linear-num-key-heads", own.kv_heads, "--linear-num-value-heads", own.heads)
        yield from ("--linear-key-head-dim", own.head_dim, "--linear-value-head-dim", own.v_head_dim)
        yield from ("--linear-conv-kernel-dim", own.conv)


def _emit_experts(model: ModelShape, layout: Layout) -> Iterable[Any]:
    layer = _pick(model, lambda layer: layer.moe is not None)
    if layer is None or layer.moe is None:
        return
    moe = layer.moe
    yield from ("--num-experts", moe.experts, "--moe-router-topk", moe.topk, "--moe-ffn-hidden-size", moe.expert.size)
    yield from ("--moe-layer-freq", write_layer_freq([one.moe is not None for one in model.layers]))
    if moe.shared is not None:
        yield from ("--moe-shared-expert-intermediate-size", moe.shared.size)
        yield from ["--moe-shared-expert-gate"] * moe.shared_gate
    if moe.groups is not None and moe.groups > 1:
        yield from ("--moe-router-num-groups", moe.groups, "--moe-router-group-topk", moe.group_topk or 1)
    yield from ("--moe-grouped-gemm", "--moe-router-dtype", "fp32")
    yield from ("--expert-model-parallel-size", layout.ep, "--expert-tensor-parallel-size", layout.etp)
    if layout.dispatcher in ("alltoall", "allgather"):
        yield from ("--moe-token-dispatcher-type", layout.dispatcher)
    else:
        yield from ("--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", layout.dispatcher)


def write_layer_freq(has_experts: list[bool]) -> str:
    """Return Megatron's ``--moe-layer-freq`` for layers with and without experts, as short as a list of runs."""
    runs: list[list[int]] = []
    for one in has_experts:
        if runs and runs[-1][0] == one:
            runs[-1][1] += 1
        else:
            runs.append([int(one), 1])
    return "(" + "+".join(f"[{value}]*{count}" for value, count in runs) + ")"


def _emit_split(plan: Plan) -> Iterable[Any]:
    """Yield how layers are split over stages."""
    layout = plan.layout
    yield from ("--pipeline-model-parallel-size", layout.pp)
    if layout.pipeline_layout is not None:
        yield from ("--pipeline-model-parallel-layout", layout.pipeline_layout)
        return
    if layout.vpp > 1:
        yield from ("--num-virtual-stages-per-pipeline-rank", layout.vpp)
    if layout.first_stage_layers is not None:
        yield from ("--decoder-first-pipeline-num-layers", layout.first_stage_layers)
    if layout.last_stage_layers is not None:
        yield from ("--decoder-last-pipeline-num-layers", layout.last_stage_layers)
    yield from ["--account-for-embedding-in-pipeline-split"] * layout.account_for_embedding
    yield from ["--account-for-loss-in-pipeline-split"] * layout.account_for_loss


def _emit_pattern(plan: Plan) -> Iterable[Any]:
    """Yield a HybridModel's pattern: a symbol for an attention and for a feed-forward, ``|`` between stages, ``/`` before MTP."""
    stages = place_layers(plan.model, plan.layout)
    text = "|".join("".join(map(_write_symbols, stage.layers)) for stage in stages)
    if plan.model.mtp is not None:
        text += ("/" + _write_symbols(plan.model.mtp)) * plan.model.mtp_layers
    yield from ("--pipeline-model-parallel-size", plan.layout.pp, "--hybrid-layer-pattern", text)


def _write_symbols(layer: LayerShape) -> str:
    return _SYMBOLS.get(layer.attention.kind, _ATTENTION) + (_EXPERTS if layer.moe is not None else _DENSE)


def _emit_sizes(plan: Plan) -> Iterable[Any]:
    layout, training = plan.layout, plan.training
    yield from ("--tensor-model-parallel-size", layout.tp, "--context-parallel-size", layout.cp)
    yield from ["--sequence-parallel"] * layout.sequence_parallel
    yield from ("--seq-length", training.seq_length)
    yield from ("--max-position-embeddings", max(training.seq_length, plan.model.positions))
    yield from ("--micro-batch-size", layout.micro_batch_size, "--global-batch-size", training.global_batch_size)
    if layout.fsdp:
        yield from ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params")
        yield from ("--ckpt-format", "fsdp_dtensor", "--init-model-with-meta-device")
        return
    yield from ["--use-distributed-optimizer"] * layout.distributed_optimizer
    yield from ["--overlap-grad-reduce"] * layout.overlap_grad_reduce
    yield from ["--overlap-param-gather"] * (
        layout.overlap_param_gather and layout.overlap_grad_reduce and layout.distributed_optimizer
    )


def _emit_precision(plan: Plan) -> Iterable[Any]:
    training = plan.training
    precision = training.precision
    yield from {"fp32": (), "fp16": ("--fp16",)}.get(precision, ("--bf16",))
    if precision == "nvfp4":
        yield from ("--fp4-format", "e2m1", "--fp4-recipe", "nvfp4")
    elif precision not in ("fp32", "fp16", "bf16"):
        recipe = precision.removeprefix("fp8-")
        yield from ("--fp8-format", "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid", "--fp8-recipe", recipe)
        yield from ["--fp8-param-gather"] * bool(training.fp8_params)
        if training.fp8_params and recipe == "mxfp8" and plan.layout.overlap_param_gather:
            yield "--reuse-grad-buf-for-mxfp8-param-ag"
    kinds = (training.main_grads, training.main_params, training.exp_avg, training.exp_avg_sq)
    if set(kinds) != {"fp32"}:
        yield "--use-precision-aware-optimizer"
        for name, kind in zip(("main-grads", "main-params", "exp-avg", "exp-avg-sq"), kinds, strict=True):
            yield from (f"--{name}-dtype", kind)
    # Under FP32 gradients of BF16 weights Megatron adds them up in FP32 by itself.
    if training.main_grads == "bf16":
        yield "--grad-reduce-in-bf16"


def _emit_recompute(layout: Layout) -> Iterable[Any]:
    recompute = layout.recompute
    if recompute.granularity == "full":
        yield from ("--recompute-granularity", "full", "--recompute-method", recompute.method)
        yield from ("--recompute-num-layers", recompute.layers)
    elif recompute.granularity == "selective":
        yield from ("--recompute-granularity", "selective", "--recompute-modules", *sorted(recompute.modules))


def _emit_rest(plan: Plan) -> Iterable[Any]:
    layout = plan.layout
    yield from () if layout.fused_attention else ("--attention-backend", "unfused")
    yield from ["--cross-entropy-loss-fusion"] * layout.cross_entropy_fusion
    if layout.optimizer_offload:
        yield from ("--optimizer-cpu-offload", "--optimizer-offload-fraction", layout.optimizer_offload)
        yield "--use-precision-aware-optimizer"
    if layout.activation_offload_layers:
        yield from ("--cpu-offloading-num-layers", layout.activation_offload_layers)
    if "full_iteration" in layout.cuda_graph:
        yield from ("--cuda-graph-impl", "full_iteration", "--no-check-for-nan-in-loss-and-grad")
    elif layout.cuda_graph:
        yield from ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-scope", *layout.cuda_graph)
        yield "--te-rng-tracker"
    yield from ["--moe-paged-stash"] * layout.paged_stash
    if is_forced(plan):
        yield "--moe-router-force-load-balancing"


def is_forced(plan: Plan) -> bool:
    """Tell whether a plan states that the router sends tokens anywhere, to measure a step."""
    has_experts = any(layer.moe for layer in plan.model.layers)
    return has_experts and plan.training.routing == "forced" and "routing" not in plan.unstated


def _emit_schedule(plan: Plan, hybrid: bool) -> Iterable[Any]:
    layout = plan.layout
    if needs_table(plan, hybrid):
        yield from ("--cf-schedule", layout.schedule)
        yield from ["--cf-overlap"] * layout.overlap
    else:
        yield from ["--overlap-moe-expert-parallel-comm"] * layout.overlap
    if layout.clones_per_rank:
        yield from ("--cf-eplb", "--cf-eplb-clones-per-rank", layout.clones_per_rank)


def needs_table(plan: Plan, hybrid: bool = False) -> bool:
    """Tell whether a plan's schedule is not one that Megatron runs itself.

    Megatron's own pairs run neither a HybridModel, clones, nor what is recomputed whole.
    """
    layout = plan.layout
    is_recomputed = layout.recompute.granularity == "full" or "moe" in layout.recomputes
    is_ours = layout.overlap and (hybrid or is_recomputed or plan.model.mtp_layers > 1 or layout.clones_per_rank > 0)
    return layout.schedule not in OWN or is_ours


def find_refusal(plan: Plan, hybrid: bool = False) -> str:
    """Return why Megatron, or counterflow on it, refuses to run a plan; nothing where it runs."""
    layout = plan.layout
    graph = ",".join(layout.cuda_graph)
    partial = bool(graph) and _WHOLE not in layout.cuda_graph
    if not any(layer.moe for layer in plan.model.layers) and (lacking := [one for one in layout.cuda_graph if "moe" in one]):
        return f"the model has no experts, and cuda_graph asks for {', '.join(lacking)}: leave it out"
    if partial and layout.recompute.granularity == "full":
        return (
            f"Megatron recomputes no whole layers under CUDA graphs of parts ({graph}): give another recompute, or cuda_graph: []"
        )
    if partial and "moe" in layout.recomputes and "moe_router" in layout.cuda_graph:
        return "Megatron recomputes no moe with moe_router in a CUDA graph: give another recompute, or cuda_graph: []"
    if needs_table(plan, hybrid):
        return _refuse_table(plan)
    if layout.clones_per_rank:
        return _refuse_clones(plan)
    if layout.fsdp and layout.overlap and layout.vpp > 1:
        return "Megatron overlaps no expert communication of several chunks under FSDP: give overlap: false, or fsdp: false"
    return ""


def _refuse_table(plan: Plan) -> str:
    layout, ours = plan.layout, f"--cf-schedule {plan.layout.schedule}"
    if layout.pp == 1:
        return "overlap with recomputed experts, more MTP layers or clones needs a table, hence pp 2 or more: give overlap: false"
    for is_there, name, change in (
        (layout.fsdp, "FSDP", "fsdp: false"), (layout.cuda_graph, "CUDA graphs", "cuda_graph: []"),
        (layout.paged_stash, "a paged stash", "paged_stash: false"),
    ):  # fmt: skip
        if is_there:
            other = "overlap: false" if layout.schedule in OWN else f"schedule {' or '.join(OWN)}"
            return f"{ours} does not run under {name}: give {change}, or {other}"
    family = FAMILIES.get(layout.schedule)
    if family is not None and family.layout in (V, BIDIRECTIONAL):
        if plan.model.mtp_layers and "m" in (layout.pipeline_layout or "").rpartition("|")[0]:
            return f"{ours} takes MTP layers on the last stage alone: {layout.pipeline_layout} has one before"
        if family.replicas > 1 and layout.dp % family.replicas:
            return f"{ours} joins pairs of replicas, and dp is {layout.dp}: give sizes that leave an even dp"
    if plan.model.mtp_layers and plan.model.tied:
        return f"{ours} takes no MTP layers with tied embeddings: give untie_embeddings_and_output_weights: true"
    return _refuse_clones(plan) if layout.clones_per_rank else ""


def _refuse_clones(plan: Plan) -> str:
    layout, training = plan.layout, plan.training
    for is_there, name, change in (
        (layout.fsdp, "FSDP", "fsdp: false"), (layout.cuda_graph, "CUDA graphs", "cuda_graph: []"),
        (layout.paged_stash, "a paged stash", "paged_stash: false"),
        (training.fp8_params, "weights in FP8", "fp8_param_gather: false"),
        (training.precision == "fp8-delayed", "precision fp8-delayed", "another precision"),
    ):  # fmt: skip
        if is_there:
            return f"--cf-eplb does not run under {name}: give {change}, or clones_per_rank: 0"
    return ""


def emit_deepspeed(plan: Plan) -> dict[str, Any]:
    """Return DeepSpeed's JSON for a plan, with counterflow's key where the schedule is not DeepSpeed's own.

    The model is the user's PipelineModule: its sizes, the pipeline's and those of tensor parallelism are made in the script.
    Raises `PlanError` for what DeepSpeed's pipelines do not do.
    """
    layout, training = plan.layout, plan.training
    if layout.fsdp and layout.pp > 1:
        raise PlanError("DeepSpeed's pipelines shard no weights and gradients: give pp 1, or fsdp: false")
    if layout.cp > 1:
        raise PlanError(f"DeepSpeed's pipelines have no context parallelism, cp {layout.cp} given: give cp 1")
    if layout.etp > 1:
        raise PlanError(f"DeepSpeed's AutoEP cuts no expert over tensor-parallel ranks, etp {layout.etp} given: give etp 1")
    if training.precision not in ("bf16", "fp16", "fp32"):
        raise PlanError(f"DeepSpeed's JSON has no precision {training.precision}: give bf16, fp16 or fp32")
    stage = 3 if layout.fsdp else int(layout.distributed_optimizer)
    if 0 < layout.optimizer_offload < 1 and stage < 3:
        raise PlanError(
            f"DeepSpeed offloads a part of the optimizer under ZeRO-3 alone, optimizer_offload {layout.optimizer_offload} given: "
            f"give 1, 0, or fsdp: true"
        )
    found: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": plan.microbatches,
        "zero_optimization": {"stage": stage},
    }
    if training.precision != "fp32":
        found[training.precision] = {"enabled": True}
    if training.precision == "bf16" and training.main_grads == "fp32":
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    if layout.optimizer_offload:
        part = {"ratio": layout.optimizer_offload} if layout.optimizer_offload < 1 else {}
        found["zero_optimization"]["offload_optimizer"] = {"device": "cpu", **part}
    if layout.ep > 1:
        found["expert_parallel"] = {"enabled": True, "autoep_size": layout.ep}
    if ours := _write_section(layout):
        found["counterflow"] = ours
    return found


def list_scripted(plan: Plan) -> list[str]:
    """Return what of a plan DeepSpeed takes from the script that makes the model, and not from its JSON."""
    layout, found = plan.layout, []
    if layout.pp > 1:
        found.append(f"pp {layout.pp} by num_stages={layout.pp} of the PipelineModule")
    if layout.tp > 1:
        sizes = f"num_pp={layout.pp}, num_mp={layout.tp}, num_dp={layout.dp * layout.cp}"
        found.append(f"tp {layout.tp} by layers that are cut so and its topology=PipeModelDataParallelTopology({sizes})")
    if layout.pp > 1 and (layout.pipeline_layout or layout.first_stage_layers or layout.last_stage_layers):
        found.append("the split of layers by its partition_method")
    recompute = layout.recompute
    if recompute.granularity is not None:
        is_interval = recompute.method == "uniform" and layout.pp > 1
        how = f"its activation_checkpoint_interval={recompute.layers}" if is_interval else "deepspeed.checkpointing in the layers"
        found.append(f"recompute {recompute} by {how}")
    if layout.cuda_graph:
        found.append(f"cuda_graph {','.join(layout.cuda_graph)} by the layers themselves")
    return found


def _write_section(layout: Layout) -> dict[str, Any]:
    """Return counterflow's key of a DeepSpeed JSON."""
    found: dict[str, Any] = {}
    if layout.pp > 1 and (layout.schedule != PLAIN_STRAIGHT or layout.overlap):
        found["schedule"] = layout.schedule
        family = FAMILIES.get(layout.schedule)
        if family is not None and family.layout == LOOPED:
            found["vpp"] = layout.vpp
        if family is not None and family.splits:
            found["zero_bubble"] = True
        if layout.overlap:
            found["overlap"] = True
    if layout.clones_per_rank:
        found["eplb"] = {"clones_per_rank": layout.clones_per_rank}
    return found
