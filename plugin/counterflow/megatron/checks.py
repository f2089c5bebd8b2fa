"""Refuse combinations of flags that cannot work, before any process group is made.

The checks read Megatron's arguments after they are parsed and before Megatron validates them. So the user gets this
plugin's message, which says what was given, what is allowed and what to change.
"""

from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from counterflow.balance.files.costs import read_costs
from counterflow.errors import OptionError, ScheduleError, SeamError
from counterflow.megatron.batches import (
    Batch,
    count_data_ranks,
    count_model_ranks,
    count_ranks,
    count_weight_shards,
    list_batches,
)
from counterflow.megatron.batches import get_argument as _get
from counterflow.megatron.engine_checks import check_engine
from counterflow.megatron.patterns import check_logged_experts, count_predictions, find_pattern, fit_pattern, has_experts
from counterflow.megatron.seams import REHOMING, check_seams
from counterflow.megatron.stages import check_stages, count_stages
from counterflow.megatron.stamp import stamp_layout
from counterflow.megatron.streams import check_streams
from counterflow.megatron.v_layout.model import is_on_way_back, unwrap
from counterflow.options import Options
from counterflow.schedule.families import list_names
from counterflow.schedule.layouts import LOOPED, STRAIGHT, Layout, V
from counterflow.trainer.crosslink import require_pairs
from counterflow.trainer.tables import build_table, choose_layout, count_replicas, name_model_layout, splits_backward

# Why homes stay in a loop that is not Megatron's.
OWN_LOOP = "moves what Megatron's optimizer keeps, and puts it back for every checkpoint, which takes megatron.training"


def prepare_arguments(args: Any, options: Options) -> None:
    """Check ``args`` against the schedule; for a V, ask Megatron for two chunks per rank if no flag names a number.

    Raises `OptionError`, with the same message on every rank.
    """
    flat = flatten(args)
    if options.eplb:
        _check_eplb(flat, options)
        check_engine(flat, "--cf-eplb")
    if options.schedule is None:
        return
    check_engine(flat, f"--cf-schedule {options.schedule}")
    ranks = _get(flat, "pipeline_model_parallel_size", 1)
    if ranks < 2:
        raise OptionError(
            f"--cf-schedule {options.schedule} needs at least 2 pipeline ranks; --pipeline-model-parallel-size is {ranks}: "
            "set it to 2 or more, or drop --cf-schedule"
        )
    _check_world_size(flat, ranks)
    table_layout = _read_layout(options, ranks)
    layout = name_model_layout(table_layout)
    if find_pattern(flat) is None:
        chunks = count_chunks(flat, ranks)
    else:
        chunks = fit_pattern(flat, _owner_of_pattern(args), ranks, table_layout, layout, options)
        flat.num_layers, flat.mtp_num_layers = None, count_predictions(flat)
        check_logged_experts(flatten(args), ranks, layout, chunks, options.schedule)
    if layout == V and chunks is None:
        _owner(args, "num_virtual_stages_per_pipeline_rank").num_virtual_stages_per_pipeline_rank = 2
        chunks = 2
    _check_chunks(options.schedule, layout, chunks)
    _check_unsupported(flat, options.schedule, options.overlap)
    check_streams(flat, options.schedule)
    if layout != STRAIGHT:
        _check_several_iterators(flat, options.schedule)
    _check_zero_bubble(flat, options)
    _check_profile(flat, options)
    _check_multi_token_prediction(flat, options.schedule, layout)
    if layout == V:
        _check_v(flat, ranks, options.schedule)
    if count_replicas(table_layout) > 1:
        _check_crosslinked(flat, ranks, options.schedule)
    check_stages(flatten(args), ranks, options.schedule)
    _check_batches(flat, ranks, chunks or 1, options)
    stamp_layout(args, options, f"{layout} {chunks or 1}")
    if getattr(_owner(args, flag := "overlap_moe_expert_parallel_comm"), flag, None):
        # Given beside --cf-overlap. With it set, Megatron refuses what its schedule plans cannot do; they are not used.
        setattr(_owner(args, flag), flag, False)
    _ignore_own_transfers(args, options.schedule, layout)


def flatten(args: Any) -> Any:
    """Return the arguments in one namespace: ``--yaml-cfg`` puts some of them into nested sections."""
    flat = dict(vars(args))
    for section in ("language_model", "model_parallel"):
        if isinstance(flat.get(section), SimpleNamespace):
            flat |= vars(flat[section])
    return SimpleNamespace(**flat)


def _owner(args: Any, name: str) -> Any:
    """Return the namespace that holds an argument: under ``--yaml-cfg`` it may be the section ``model_parallel``."""
    section = getattr(args, "model_parallel", None)
    return section if isinstance(section, SimpleNamespace) and not hasattr(args, name) else args


def _owner_of_pattern(args: Any) -> Any:
    """Return the namespace that holds HybridModel's pattern: under ``--yaml-cfg`` it may be the section ``language_model``."""
    section = getattr(args, "language_model", None)
    return section if isinstance(section, SimpleNamespace) and find_pattern(args) is None else args


def _read_layout(options: Options, ranks: int) -> Layout:
    # A family's layout is the same for any number of chunks; `_check_chunks` checks the number later.
    return choose_layout(options, ranks, 1)


def _check_world_size(args: Any, ranks: int) -> None:
    world = count_ranks(args)
    tensor = _get(args, "tensor_model_parallel_size", 1)
    context = _get(args, "context_parallel_size", 1)
    expert = _get(args, "expert_model_parallel_size", 1)
    expert_tensor = _get(args, "expert_tensor_parallel_size", tensor)
    for model, names, shards in (
        ((tensor, context, ranks), "TP x CP x PP", count_weight_shards(args)),
        ((expert, expert_tensor, ranks), "EP x ETP x PP", count_weight_shards(args, "expert_")),
    ):
        sizes, names = ((*model, shards), f"{names} x weight shards") if shards > 1 else (model, names)
        if world % (size := prod(sizes)):
            raise OptionError(
                f"{world} ranks do not fit {names} = {' x '.join(map(str, sizes))} = {size}: "
                f"start a multiple of {size} ranks or change the parallel sizes"
            )


def count_chunks(args: Any, ranks: int) -> int | None:
    """Return the number of model chunks per pipeline rank that the flags ask for; None if no flag names one."""
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    if layout is not None:
        return max(1, count_stages(layout) // ranks)
    per_chunk = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    if per_chunk is not None:
        return int(max(1, args.num_layers // ranks // per_chunk))
    return getattr(args, "num_virtual_stages_per_pipeline_rank", None)


def _check_chunks(schedule: str, layout: str, chunks: int | None) -> None:
    change = "set --num-virtual-stages-per-pipeline-rank"
    found = f"{chunks} chunks per rank given" if chunks is not None else "none given"
    if layout == V and chunks != 2:
        raise OptionError(f"--cf-schedule {schedule} holds 2 model chunks per pipeline rank (VPP 2), {found}: {change} 2")
    if layout == STRAIGHT and chunks not in (None, 1):
        raise OptionError(
            f"--cf-schedule {schedule} holds 1 model chunk per pipeline rank, {found}: {change} 1 or choose "
            + " or ".join(list_names(LOOPED))
        )
    if layout == LOOPED and (chunks is None or chunks < 2):
        raise OptionError(
            f"--cf-schedule {schedule} holds 2 or more model chunks per pipeline rank (VPP), {found}: {change} 2 or more"
        )


def _check_unsupported(args: Any, schedule: str, overlap: bool) -> None:
    """Refuse flags of Megatron that do not work with any schedule table yet."""
    refused = {
        "num_microbatches_with_partial_activation_checkpoints": "--num-microbatches-with-partial-activation-checkpoints",
        "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
        "defer_embedding_wgrad_compute": "--defer-embedding-wgrad-compute",
        "moe_paged_stash": "--moe-paged-stash",
        # Megatron may run such a step a second time. It then reads data by its own layout of the model.
        "moe_expert_rank_capacity_factor": "--moe-expert-rank-capacity-factor",
        "hybrid_context_parallel": "--hybrid-context-parallel",
        "use_megatron_fsdp": "--use-megatron-fsdp",
        "use_torch_fsdp2": "--use-torch-fsdp2",
        "enable_cuda_graph": "--enable-cuda-graph",
        "external_cuda_graph": "--external-cuda-graph",
    }
    _refuse_flags(args, refused, f"--cf-schedule {schedule}")
    _refuse_weight_shards(args, f"--cf-schedule {schedule}")
    if getattr(args, "overlap_moe_expert_parallel_comm", None) and not overlap:
        raise OptionError(
            f"--cf-schedule {schedule} does not take --overlap-moe-expert-parallel-comm: give --cf-overlap in its place"
        )
    graph = getattr(args, "cuda_graph_impl", None) or "none"
    if graph != "none":
        raise OptionError(
            f"--cf-schedule {schedule} does not run under CUDA graphs: --cuda-graph-impl {graph} given, none is allowed; "
            "full-iteration and per-chunk graphs fix the order that the schedule decides"
        )


def _check_several_iterators(args: Any, schedule: str) -> None:
    """Refuse flags under which Megatron passes one data iterator only, or expects data on every model chunk."""
    refused = {
        "full_validation": "--full-validation",
        "multiple_validation_sets": "--multiple-validation-sets",
        "perform_rl_step": "--perform-rl-step",
    }
    _refuse_flags(args, refused, f"--cf-schedule {schedule}, of several model chunks per rank,")


def _refuse_flags(args: Any, refused: dict[str, str], ours: str) -> None:
    """Raise `OptionError` if an argument named in ``refused`` is set; ``ours`` is the flag of this plugin that excludes it."""
    for name, flag in refused.items():
        if getattr(args, name, None):
            raise OptionError(f"{ours} does not run with {flag} in this version: drop one of the two")


def _refuse_weight_shards(args: Any, ours: str) -> None:
    """Refuse generalized tensor parallelism: it gathers weights in a fixed order of layers and reduces their gradients late."""
    tensor = _get(args, "tensor_model_parallel_size", 1)
    for kind, ranks in (("", tensor), ("expert_", _get(args, "expert_tensor_parallel_size", tensor))):
        shards = _get(args, f"{kind}tensor_parallel_num_weight_shards", ranks * _get(args, f"{kind}gtp_weight_remat_size", 1))
        if shards > ranks:
            name = f"{kind}tensor_parallel".replace("_", "-")
            raise OptionError(
                f"{ours} does not run with --{name}-num-weight-shards {shards} on {ranks} {name} rank{'s' if ranks > 1 else ''} "
                f"in this version: weights that are cut further are not tested with it; drop one of the two, or give {ranks}"
            )


def _check_zero_bubble(args: Any, options: Options) -> None:
    """Refuse to split backward passes that Transformer Engine cannot split; they run whole for whoever says so."""
    from counterflow.megatron.pipeline.zero_bubble import find_engine_obstacle, find_old_engine

    if getattr(args, "transformer_impl", "") != "transformer_engine" or not splits_backward(options):
        return
    if options.zero_bubble and (obstacle := find_engine_obstacle(args)):
        raise OptionError(f"--cf-zero-bubble cannot split Transformer Engine's backward passes, {obstacle}; or drop the flag")
    if old := find_old_engine():
        raise OptionError(
            f"--cf-schedule {options.schedule} cannot split Transformer Engine's backward passes, {old}: install that, or give "
            "--no-cf-zero-bubble for whole ones"
        )


def _check_profile(args: Any, options: Options) -> None:
    """Refuse ``--cf-profile`` beside Megatron's own torch profiler: a process has one at a time. Its ranges for nsys may stay."""
    if options.profile is not None and _get(args, "profile", False) and _get(args, "use_pytorch_profiler", False):
        raise OptionError(
            f"--cf-profile {options.profile} and --profile --use-pytorch-profiler are both given and a process has one torch "
            "profiler at a time: drop one of them"
        )


def _ignore_own_transfers(args: Any, schedule: str, layout: str) -> None:
    """Ignore flags for Megatron's own transfers between pipeline ranks: set them so that its checks pass; rank 0 prints which."""
    owner = _owner(args, "overlap_p2p_comm")
    ignored = []
    # With one chunk per rank Megatron switches the overlap off itself.
    if layout != STRAIGHT and getattr(owner, "overlap_p2p_comm", None) is False:
        owner.overlap_p2p_comm = True
        ignored.append("--no-overlap-p2p-communication")
    if getattr(owner, "overlap_p2p_comm_warmup_flush", False):
        owner.overlap_p2p_comm_warmup_flush = False
        ignored.append("--overlap-p2p-communication-warmup-flush")
    if layout != LOOPED and getattr(owner, "microbatch_group_size_per_vp_stage", None) is not None:
        ignored.append("--microbatch-group-size-per-virtual-pipeline-stage")
    # `check_loop` passes a model's config, which has no rank. There these fields are set even if nobody asked for them.
    if ignored and getattr(args, "rank", None) == 0:
        reason = "it moves tensors between pipeline ranks itself, in the order of its table"
        print(f"counterflow: {' and '.join(ignored)} ignored under --cf-schedule {schedule}: {reason}", flush=True)


def _check_multi_token_prediction(args: Any, schedule: str, layout: str) -> None:
    layers = getattr(args, "mtp_num_layers", None)
    if not layers:
        return
    if not getattr(args, "untie_embeddings_and_output_weights", False):
        raise OptionError(
            f"--mtp-num-layers {layers} with tied embeddings: on several pipeline ranks Megatron-Core gives the last stage an "
            "output weight of its own, which its checkpoints refuse: add --untie-embeddings-and-output-weights"
        )
    stages = getattr(args, "pipeline_model_parallel_layout", None)
    if layout == V and isinstance(stages, str) and "m" in stages.rpartition("|")[0]:
        raise OptionError(
            f"--cf-schedule {schedule} keeps all copies of the embedding on the first rank, where a V begins and ends: "
            f"--pipeline-model-parallel-layout {stages} has an MTP layer (m) before the last stage, move it to the last"
        )


def _check_v(args: Any, ranks: int, schedule: str) -> None:
    """Refuse what does not work yet if the model ends on its first pipeline rank, as in a V."""
    saves = getattr(args, "save", None) or getattr(args, "load", None)
    if saves and getattr(args, "ckpt_format", "torch_dist") != "torch_dist":
        raise OptionError(
            f"--cf-schedule {schedule} needs checkpoints whose keys name global layers: --ckpt-format {args.ckpt_format} given, "
            "torch_dist is allowed"
        )
    # The first two put hooks on the last chunk of the last pipeline rank, where a V does not end. The third deals shards as
    # an earlier run did, which may have had another layout.
    refused = {
        "logits_load_dir": "--logits-load-dir",
        "logits_save_dir": "--logits-save-dir",
        "ckpt_pg_tensors_cache_path": "--ckpt-pg-tensors-cache-path",
    }
    _refuse_flags(args, refused, f"--cf-schedule {schedule}")
    uneven = (
        "pipeline_model_parallel_layout",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    layers = getattr(args, "num_layers", None)
    if layers is not None and layers % (2 * ranks) and not any(getattr(args, name, None) for name in uneven):
        low = layers // (2 * ranks) * 2 * ranks
        near = f"{low} or {low + 2 * ranks}" if low else f"{2 * ranks}"
        raise OptionError(
            f"{layers} layers cannot be laid out on {2 * ranks} stages (2 chunks on each of {ranks} pipeline ranks): "
            f"set --num-layers to a multiple of {2 * ranks} ({near}) or give --pipeline-model-parallel-layout"
        )


def _check_crosslinked(args: Any, ranks: int, schedule: str) -> None:
    """Refuse what full DualPipe cannot link in pairs, and loaders that would give a rank the wrong replica's labels."""
    require_pairs(schedule, count_data_ranks(args, ranks), count_model_ranks(args, ranks))
    if getattr(args, "dataloader_type", None) == "external":
        raise OptionError(
            f"--cf-schedule {schedule} computes each loss in the partner replica and reads the labels there: "
            "--dataloader-type external given, single and cyclic are allowed, whose samplers are known"
        )


def _check_batches(args: Any, ranks: int, chunks: int, options: Options) -> None:
    """Refuse batch sizes for which the schedule has no table.

    If the run may resume, the checkpoint decides which sizes are still to come; they are checked when it is read.
    """
    batches = list_batches(args, ranks)
    if len(batches) == 1 or not may_resume(args):
        check_tables(args, ranks, chunks, options, batches)


def may_resume(args: Any) -> bool:
    """Tell whether the run may resume from a checkpoint, with the number of consumed samples that it names."""
    load = getattr(args, "load", None)
    if not load or getattr(args, "finetune", False):
        return False
    elsewhere = getattr(args, "ckpt_step", None) or getattr(args, "non_persistent_ckpt_type", None) or "://" in str(load)
    return bool(elsewhere) or (Path(load) / "latest_checkpointed_iteration.txt").is_file()


def check_tables(args: Any, ranks: int, chunks: int, options: Options, batches: list[Batch]) -> None:
    """Refuse a schedule that has no table for one of the batch sizes."""
    counts = list(dict.fromkeys(batch.microbatches for batch in batches))
    sizes = ", then ".join(f"{batch.samples} samples ({batch.microbatches} micro-batches)" for batch in batches[:8])
    if options.schedule_file is not None and len(counts) > 1:
        microbatches = options.file_table.microbatches
        raise OptionError(
            f"--cf-schedule {options.schedule_file} is a table for one size, {microbatches} micro-batches; this run has batches "
            f"of {sizes}: keep to one batch size, or choose a schedule by name, which is built for each"
        )
    several = f"; this run has batches of {sizes}" if len(batches) > 1 else ""
    for count in counts:
        try:
            build_table(options, ranks, count, chunks, _get(args, "microbatch_group_size_per_vp_stage", None))
        except ScheduleError as error:
            if options.schedule_file is not None:
                raise
            raise OptionError(f"{error}{several}: change {_name_batch_flags(args)}") from None


def _name_batch_flags(args: Any) -> str:
    size = "--global-batch-size"
    if getattr(args, "step_batch_size_schedule", None) is not None:
        size = "--step-batch-size-schedule"
    return f"{size}, --micro-batch-size or --pipeline-model-parallel-size"


def _check_eplb(args: Any, options: Options) -> None:
    """Refuse what cannot be balanced. Expert-parallel size 1 is allowed: the first step logs that nothing is balanced."""
    # A YAML file has the name of the model's config, num_moe_experts.
    experts = getattr(args, "num_experts", None) or getattr(args, "num_moe_experts", None)
    if experts:
        _check_slots(experts, _get(args, "expert_model_parallel_size", 1), options)
    elif not getattr(args, "use_checkpoint_args", False):
        raise OptionError("--cf-eplb balances the experts of a mixture-of-experts model and --num-experts is not given: drop it")
    if (pattern := find_pattern(args)) is not None and not has_experts(pattern):
        raise OptionError(f"--cf-eplb balances layers of experts (E) and --hybrid-layer-pattern '{pattern}' has none: drop it")
    if getattr(args, "moe_expert_capacity_factor", None) is not None:
        raise OptionError(
            f"--cf-eplb does not run with --moe-expert-capacity-factor {args.moe_expert_capacity_factor}, which drops (and "
            "with --moe-pad-expert-input-to-capacity pads) what balancing would move: drop it, balanced experts need no capacity"
        )
    refused = {
        "moe_pad_expert_input_to_capacity": "--moe-pad-expert-input-to-capacity",
        "moe_paged_stash": "--moe-paged-stash",
        # Megatron may run such a step a second time, and its loads would count twice.
        "moe_expert_rank_capacity_factor": "--moe-expert-rank-capacity-factor",
        # One tensor for all experts of a rank: none of them can be sent or moved alone.
        "moe_single_grouped_weight": "--moe-single-grouped-weight",
        "moe_single_grouped_bias": "--moe-single-grouped-bias",
        # It would count only the tokens that homes computed; --cf-record counts all tokens of an expert.
        "save_tokens_per_expert_interval": "--save-tokens-per-expert-interval",
        "moe_use_upcycling": "--moe-use-upcycling",
        "use_megatron_fsdp": "--use-megatron-fsdp",
        "use_torch_fsdp2": "--use-torch-fsdp2",
        # Bytes, scales, transposes and masters of a home are then parts of Megatron's gather, which knows nothing of clones.
        "fp8_param_gather": "--fp8-param-gather (in FP8 without it, clones already receive FP8 weights)",
        "fp4_param_gather": "--fp4-param-gather",
        "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
        "enable_cuda_graph": "--enable-cuda-graph",
        "external_cuda_graph": "--external-cuda-graph",
    }
    _refuse_flags(args, refused, "--cf-eplb")
    _refuse_weight_shards(args, "--cf-eplb")
    graph = getattr(args, "cuda_graph_impl", None) or "none"
    if graph != "none":
        raise OptionError(f"--cf-eplb does not run under CUDA graphs: --cuda-graph-impl {graph} given, none is allowed")
    dispatcher = getattr(args, "moe_token_dispatcher_type", None)
    if dispatcher not in (None, "alltoall", "allgather", "flex"):
        raise OptionError(
            f"--cf-eplb does not know --moe-token-dispatcher-type {dispatcher}: alltoall, allgather and flex are allowed"
        )
    if getattr(args, "fp8", None) and (_get(args, "fp8_recipe", "delayed")) == "delayed":
        raise OptionError(
            "--cf-eplb does not run with --fp8-recipe delayed, whose scales are another expert's history once a clone changes: "
            "give tensorwise, blockwise or mxfp8"
        )
    shared = f"--cf-eplb-plan {options.eplb_plan} and --cf-eplb-buffers {options.eplb_buffers}"
    if getattr(args, "fp8", None) and options.shared_clones and not getattr(args, "moe_grouped_gemm", None):
        raise OptionError(
            f"{shared} with --fp8-format {args.fp8} and without --moe-grouped-gemm: a linear of a single expert keeps one FP8 "
            "weight, which micro-batches would overwrite: give --moe-grouped-gemm, or --cf-eplb-plan predicted and per-layer "
            "buffers"
        )
    if getattr(args, "fp4", None) and options.shared_clones:
        raise OptionError(
            f"{shared} with --fp4-format {args.fp4}: clones in shared slots do not compute in FP4 in this version: give "
            "--cf-eplb-plan predicted and per-layer buffers"
        )
    if options.eplb_measure_forced and getattr(args, "moe_router_force_load_balancing", False):
        raise OptionError(
            f"--cf-eplb-measure-forced {options.eplb_measure_forced} measures beside a router that chooses, and "
            "--moe-router-force-load-balancing is given, which draws at random: drop one of the two"
        )
    if options.eplb_costs is not None:
        read_costs(options.eplb_costs)
    _check_rehoming(args, options)


def _check_slots(experts: int, ranks: int, options: Options) -> None:
    if experts % ranks:
        raise OptionError(
            f"--cf-eplb: {experts} experts (--num-experts) do not divide by --expert-model-parallel-size {ranks}: "
            "change one of the two so that every rank is home to as many"
        )
    others = experts - experts // ranks
    if ranks > 1 and options.eplb_clones_per_rank > others:
        raise OptionError(
            f"--cf-eplb-clones-per-rank {options.eplb_clones_per_rank} given; each rank is home to {experts // ranks} of "
            f"{experts} experts, so {others} at most can be cloned on it: give {others} or less"
        )


def _check_rehoming(args: Any, options: Options) -> None:
    if options.needs_moves and (obstacle := find_homes_obstacle(args)) is not None:
        raise OptionError(f"{_name_moves(options)} {obstacle}: drop one of the two")


def _name_moves(options: Options) -> str:
    """Return what of the options needs homes that move."""
    is_asked = "eplb_rehome_interval" in options.model_fields_set
    return "--cf-eplb-rehome-interval" if is_asked else "--cf-eplb-clones-per-rank 0 leaves homes alone to move, and that"


def find_homes_obstacle(args: Any) -> str | None:
    """Return why homes cannot move in this run, as the end of a sentence about moves; None if they can.

    ``args`` are those of ``megatron.training``, None in a loop that does not use it.
    """
    if args is None:
        return OWN_LOOP
    try:
        check_seams([REHOMING])
    except SeamError as error:
        return f"does not fit: {error}"
    optimizer = getattr(args, "optimizer", None) or "adam"
    if optimizer not in ("adam", "sgd"):
        return f"moves the state of adam and sgd; --optimizer {optimizer} given"
    refused = {
        "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
        "optimizer_cpu_offload": "--optimizer-cpu-offload",
        "use_layer_wise_distributed_optimizer": "--use-layer-wise-distributed-optimizer",
        # It copies the model's weights to another one beside the checkpoints, for which homes are put in order.
        "perform_rl_step": "--perform-rl-step",
    }
    given = next((flag for name, flag in refused.items() if getattr(args, name, None)), None)
    return None if given is None else f"does not run with {given} in this version"


def check_loop(chunks: list[Any], options: Options) -> None:
    """Check the options against the model's config in the first step of a loop that does not use ``megatron.training``.

    Under ``megatron.training``, `prepare_arguments` does this before anything is built. Raises `OptionError` on every rank.
    """
    config = get_model_config(chunks[0])
    prepare_arguments(describe_model(chunks, config), options)
    if options.needs_moves:
        raise OptionError(f"{_name_moves(options)} {OWN_LOOP}: drop it in a loop of your own")
    if options.schedule is None:
        return
    if options.zero_bubble and any(getattr(part, "wgrad_store", None) for chunk in chunks for part in chunk.modules()):
        raise OptionError(
            "--cf-zero-bubble cannot split the backward passes of Transformer Engine's modules in a loop of your own in this "
            "version: drop the flag, then they run whole"
        )


def describe_model(chunks: list[Any], config: Any) -> Any:
    """Return a model's config as a namespace with the argument names of ``megatron.training``."""
    args = SimpleNamespace(**vars(config))
    args.num_experts = config.num_moe_experts
    if getattr(args, "transformer_impl", "") == "transformer_engine":
        # The default of every config, whatever the model's layers are; they are built already.
        del args.transformer_impl
    args.num_virtual_stages_per_pipeline_rank = len(chunks) if len(chunks) > 1 else None
    if args.pipeline_model_parallel_layout is not None or hasattr(unwrap(chunks[0]), "hybrid_layer_pattern"):
        # The stages are built already, as this layout or pattern says: there is nothing left to check.
        args.pipeline_model_parallel_layout = args.num_layers = args.moe_n_hash_layers = None
    shared = [getattr(unwrap(chunk), "share_embeddings_and_output_weights", False) for chunk in chunks]
    args.untie_embeddings_and_output_weights = not any(shared)
    return args


def check_chunks(chunks: list[Any], options: Options) -> None:
    """Raise `OptionError` unless the chunks of this rank were built for the schedule in force."""
    layout = name_model_layout(_read_layout(options, 2))
    _check_chunks(options.schedule or "", layout, len(chunks))
    # Only Megatron's modules depend on their pipeline rank; for any other module the builder is responsible.
    if layout == V and isinstance(unwrap(chunks[1]), MegatronModule) and not is_on_way_back(chunks[1]):
        raise OptionError(
            f"--cf-schedule {options.schedule} runs chunks in a V and this model's second chunk was not built for one: build "
            "each chunk of a rank by counterflow.lay_out_chunks(…) of your builder, called with vp_stage=0, then with "
            "vp_stage=1, after counterflow.enable()"
        )
