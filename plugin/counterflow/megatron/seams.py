"""All symbols of Megatron that the plugin replaces, calls or reads; a feature's symbols are checked before it is in force.

``wrap`` is the name of a function of this package, or, with a dot before it, of an attribute of the run's `Installation`. A
symbol has one wrapper; if several features change it, the wrapper composes them and states the order. docs/seams.md is written
from this list; the anchors of the patch files are in it too.
"""

import importlib.util
from collections.abc import Collection

from counterflow.trainer.seam import Seam
from counterflow.trainer.seam import check_seams as check_all

TRAINER = "megatron.training"
DEEP_EP = "deep_ep"

FLAGS, SCHEDULE, V_LAYOUT, CROSSLINK = "flags", "schedule", "V layout", "cross-linked replicas"
ZERO_BUBBLE, ENGINE, OVERLAP = "zero bubble", "zero bubble of Transformer Engine", "overlapped pairs"
EPLB, REHOMING = "expert balancing", "homes that move"
DRY_RUN = "dry run of a plan"
# What the user can do if a feature's seams do not fit. Symbols that the checks of all flags import belong to FLAGS.
REMEDIES = {
    FLAGS: "run the script without counterflow",
    SCHEDULE: "drop --cf-schedule",
    V_LAYOUT: "give --cf-schedule another layout than a V (1f1b, gpipe, zb-h1, interleaved)",
    CROSSLINK: "give --cf-schedule dualpipev in place of dualpipe",
    ZERO_BUBBLE: "give --no-cf-zero-bubble",
    ENGINE: "give --no-cf-zero-bubble",
    OVERLAP: "drop --cf-overlap",
    EPLB: "drop --cf-eplb",
    REHOMING: "drop --cf-eplb-rehome-interval",
    DRY_RUN: "give --memory formula",
}

KNOWN = ("0.17", "0.18", "0.19", "0.20")
SINCE_18 = KNOWN[1:]
# Linear attention is a package of its own.
WITH_DELTA = KNOWN[2:]

SCHEDULES = "megatron.core.pipeline_parallel.schedules"
STATE = "megatron.core.parallel_state"
ARGUMENTS, TRAINING, SAVING = f"{TRAINER}.arguments", f"{TRAINER}.training", f"{TRAINER}.checkpointing"
LAYERS, LINEAR = "megatron.core.tensor_parallel.layers", "LinearWithGradAccumulationAndAsyncCommunication"
PARALLEL = "megatron.core.distributed.DistributedDataParallel"
BUCKETS = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"
LAYOUTS = "megatron.core.transformer.pipeline_parallel_layer_layout"
HYBRID = "megatron.core.models.hybrid.hybrid_layer_allocation"
MOE = "megatron.core.transformer.moe"
MOE_LAYER = f"{MOE}.moe_layer.MoELayer"
FORMAT = "megatron.core.dist_checkpointing"
OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"

STARTING = (
    Seam(ARGUMENTS, "add_megatron_arguments", "install.show_flags", (FLAGS,), KNOWN, "flags in the script's --help", ("parser",)),
    Seam(
        ARGUMENTS, "parse_args", ".prepare_after", (FLAGS,), KNOWN, "options and early refusals",
        ("extra_args_provider", "ignore_unknown_args"),
    ),
    Seam(f"{TRAINER}.global_vars", "_GLOBAL_ARGS", None, (FLAGS,), KNOWN, "whose loop trains, and the number of its iteration"),
    Seam(TRAINER, "print_rank_last", None, (FLAGS,), KNOWN, "the line after which the patch file turns the plugin on"),
    *(
        Seam(
            "megatron.core.num_microbatches_calculator", "_build_num_microbatches_calculator", None, (SCHEDULE,), versions,
            "batch sizes that a run will have",
            ("rank", *more, "global_batch_size", "micro_batch_size", "data_parallel_size", "decrease_batch_size_if_needed"),
        )
        for versions, more in ((KNOWN[:1], ("rampup_batch_size",)), (SINCE_18, ()))
    ),
    Seam(f"{HYBRID}.Symbols", "VALID_LAYERS", None, (SCHEDULE,), SINCE_18, "symbols of a HybridModel's layers"),
    Seam(HYBRID, "parse_hybrid_pattern", None, (SCHEDULE,), SINCE_18, "what its pattern says", ("pattern",)),
    Seam(
        LAYOUTS, "PipelineParallelLayerLayout", None, (SCHEDULE,), KNOWN, "what --pipeline-model-parallel-layout says",
        ("layout", "pipeline_model_parallel_size"),
    ),
    Seam(
        f"{LAYOUTS}.PipelineParallelLayerLayout", "get_num_stages_from_str", None, (SCHEDULE,), KNOWN, "the chunks it asks for",
        ("layout",),
    ),
    Seam(
        f"{LAYOUTS}.PipelineParallelLayerLayout", "validate_layer_layout", None, (SCHEDULE,), KNOWN, "whether it fits the model",
        ("self", "num_layers", "mtp_num_layers"),
    ),
    Seam("megatron.core.transformer.enums", "LayerType", None, (SCHEDULE,), KNOWN, "what its stages hold"),
    Seam(
        "megatron.core.transformer.transformer_config", "TransformerConfig", None, (SCHEDULE,), KNOWN,
        "whether hyper-connections may cross from stage to stage",
    ),
    Seam("megatron.core.utils", "get_model_config", None, (FLAGS, SCHEDULE, EPLB), KNOWN, "the model's config", ("model",)),
)  # fmt: skip

STEPPING = (
    Seam(
        SCHEDULES, "get_forward_backward_func", ".choose_schedule", (SCHEDULE, EPLB), KNOWN,
        "the pipeline schedule; around it, the step of the clones", ("pp_size", "vp_size"),
    ),
    Seam(SCHEDULES, "forward_backward_no_pipelining", None, (SCHEDULE,), KNOWN, "a model without a pipeline keeps its schedule"),
    Seam(
        SCHEDULES, "P2PCommunicator", ".refuse_own_transfers", (SCHEDULE,), KNOWN,
        "made by Megatron's own pipelined schedules alone: they do not run in place of the chosen one", ("pp_group", "config"),
        alone=True,
    ),
    Seam(
        SCHEDULES, "forward_step", None, (SCHEDULE,), KNOWN, "called for each F",
        ("forward_step_func", "data_iterator", "model", "num_microbatches", "input_tensor", "forward_data_store", "config"),
    ),
    Seam(
        SCHEDULES, "backward_step", None, (SCHEDULE,), KNOWN, "called for each B",
        ("input_tensor", "output_tensor", "output_tensor_grad", "config"),
    ),
    Seam(
        SCHEDULES, "get_tensor_shapes", None, (SCHEDULE,), KNOWN, "shape of what the ranks send each other",
        ("seq_length", "micro_batch_size", "decoder_seq_length", "config", "tp_group", "cp_group"),
    ),
    Seam(
        SCHEDULES, "check_first_val_step", None, (SCHEDULE,), KNOWN, "FP8 caches", ("first_val_step", "forward_only", "cond")
    ),
    Seam(
        SCHEDULES, "deallocate_output_tensor", None, (SCHEDULE,), KNOWN, "frees what has been sent",
        ("out", "deallocate_pipeline_outputs"),
    ),
    Seam(
        "megatron.core.pipeline_parallel.p2p_communication", "P2PCommunicator", None, (SCHEDULE,), KNOWN,
        "what a loop may hand over, and is not used",
    ),
    Seam(
        "megatron.core.process_groups_config.ProcessGroupCollection", "use_mpu_process_groups", None, (SCHEDULE,), KNOWN,
        "the process groups, where a loop hands over none",
    ),
    Seam(STATE, "get_pipeline_model_parallel_world_size", None, (SCHEDULE,), KNOWN, "whether there is a pipeline"),
    Seam(STATE, "get_data_parallel_rank", None, (SCHEDULE,), KNOWN, "whose samples a chunk reads"),
    Seam(PARALLEL, "start_grad_sync", None, (SCHEDULE,), KNOWN, "starts a chunk's reductions behind its last W", ("self",)),
    Seam(PARALLEL, "ddp_config", None, (SCHEDULE,), KNOWN, "whether reductions overlap"),
    Seam("megatron.core.transformer.module", "Float16Module", None, (FLAGS, SCHEDULE), KNOWN, "wraps a chunk"),
    Seam("megatron.core.transformer.module", "MegatronModule", None, (FLAGS, SCHEDULE), KNOWN, "what a chunk is"),
    Seam("megatron.core.distributed", "DistributedDataParallel", None, (FLAGS, SCHEDULE, EPLB), KNOWN, "wraps a chunk"),
    Seam(
        TRAINING, "dummy_train_step", "pipeline.iterators.draw_from_every_chunk", (SCHEDULE,), KNOWN,
        "skipped iterations of several chunks", ("data_iterator",),
    ),
    Seam(
        SAVING, "maybe_save_dataloader_state", "pipeline.iterators.save_first_chunks_loader", (SCHEDULE,), KNOWN,
        "data loaders of several chunks", ("train_iterator", "iteration", "dataloader_save_path"),
    ),
    Seam(
        "megatron.core.rerun_state_machine", "get_rerun_state_machine", None, (SCHEDULE, EPLB), KNOWN,
        "how often a skipped step is run",
    ),
    Seam(
        "megatron.core.num_microbatches_calculator", "get_num_microbatches", None, (SCHEDULE, EPLB), KNOWN,
        "micro-batches of a skipped step, and of a step that is planned",
    ),
    Seam(
        SAVING, "_load_base_checkpoint", ".guard_checkpoint", (SCHEDULE, EPLB), KNOWN,
        "optimizer state of another layout, batch sizes to come, copies of the embedding, other experts", ("load_dir", "args"),
    ),
)  # fmt: skip

SPLITTING = (
    Seam(
        LAYERS, LINEAR, "pipeline.zero_bubble.make_split_linear", (ZERO_BUBBLE,), KNOWN,
        "weight gradients of local linears",
    ),
    Seam(
        f"{LAYERS}.{LINEAR}", "forward", None, (ZERO_BUBBLE,), KNOWN,
        "what a linear's backward finds in its context",
        (
            "ctx", "input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel",
            "grad_output_buffer", "wgrad_deferral_limit", "tp_group",
        ),
    ),
    Seam(
        LAYERS, "prepare_input_tensors_for_wgrad_compute", None, (ZERO_BUBBLE,), KNOWN, "operands of a weight gradient",
        ("grad_output", "all_gathered_input"),
    ),
    Seam(
        "megatron.core.tensor_parallel.mappings", "gather_from_sequence_parallel_region", None, (ZERO_BUBBLE,), KNOWN,
        "gathers an input that was saved in shards", ("input_",),
    ),
    Seam(PARALLEL, "param_to_bucket_group", None, (ZERO_BUBBLE,), KNOWN, "which reduction a weight's gradient is part of"),
    Seam(BUCKETS, "grad_reduce_handle", None, (ZERO_BUBBLE,), KNOWN, "whether that reduction has begun"),
    Seam(
        "megatron.core.transformer.transformer_config.TransformerConfig", "__post_init__", "pipeline.zero_bubble.delay_after",
        (ENGINE,), KNOWN, "Transformer Engine's modules keep their weight gradients", ("self",),
    ),
    Seam(
        "megatron.core.distributed.DistributedDataParallelConfig", "__post_init__", "pipeline.zero_bubble.delay_after",
        (ENGINE,), KNOWN, "data parallelism knows of it", ("self",),
    ),
    Seam(
        PARALLEL, "_make_backward_post_hook", "pipeline.zero_bubble.accept_missing", (ENGINE,), KNOWN,
        "two input gradients before two weight gradients of a module", ("self", "param"),
    ),
)  # fmt: skip

PAIRING = (
    Seam(MOE_LAYER, "dispatch", "pipeline.overlap.mark_dispatch", (OVERLAP,), KNOWN, "communicates", ("self", "hidden_states")),
    Seam(MOE_LAYER, "combine", "pipeline.overlap.mark_combine", (OVERLAP,), KNOWN, "communicates", ("self", "output")),
    Seam(
        "torch.distributed", "all_to_all_single", "pipeline.overlap.hand_over_in", (OVERLAP,), KNOWN,
        "does not wait inside a communication", ("output", "input"), alone=True,
    ),
    *(
        Seam(
            "megatron.core.tensor_parallel.mappings", name, "pipeline.overlap.hand_over_in", (OVERLAP,), KNOWN,
            "nor do the allgather dispatcher's", alone=True,
        )
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func")
    ),
    Seam(
        f"{DEEP_EP}.utils.EventOverlap", "current_stream_wait", "pipeline.overlap.hand_over_before", (OVERLAP,), KNOWN,
        "the flex dispatcher waits", ("self",),
    ),
    Seam(STATE, "_GLOBAL_MEMORY_BUFFER", None, (OVERLAP,), KNOWN, "one for each part of a pair"),
    Seam("megatron.core.utils", "GlobalMemoryBuffer", None, (OVERLAP,), KNOWN, "that of the B"),
    Seam(STATE, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", None, (V_LAYOUT, OVERLAP), KNOWN, "the rank to go back to"),
    Seam("megatron.core.tensor_parallel.random", "get_cuda_rng_tracker", None, (OVERLAP,), KNOWN, "random numbers of each part"),
)  # fmt: skip

TURNING = (
    Seam(
        STATE, "initialize_model_parallel", "v_layout.embeddings.keep_embeddings_on_first_rank", (V_LAYOUT,), KNOWN,
        "copies of the embedding", ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    ),
    Seam(STATE, "model_parallel_is_initialized", None, (V_LAYOUT,), KNOWN, "whether that is too late"),
    Seam(STATE, "set_pipeline_model_parallel_rank", None, (V_LAYOUT,), KNOWN, "the mirrored rank", ("rank",)),
    Seam(STATE, "_PIPELINE_MODEL_PARALLEL_GROUP", None, (V_LAYOUT,), KNOWN, "mirrored while chunk 1 is built"),
    Seam(STATE, "get_pipeline_model_parallel_group", None, (V_LAYOUT,), KNOWN, "the group that is mirrored"),
    Seam(STATE, "get_pipeline_model_parallel_rank", None, (V_LAYOUT,), KNOWN, "whether a builder took the mirrored rank"),
    Seam(STATE, "is_pipeline_last_stage", None, (V_LAYOUT,), KNOWN, "whether chunk 1 ends the model", ("ignore_virtual",)),
    Seam(
        TRAINING, "get_model", "v_layout.model.build_in_v", (V_LAYOUT,), KNOWN, "model provider",
        ("model_provider_func", "model_type", "wrap_with_ddp"),
    ),
    Seam(
        f"{TRAINER}.models.dist_utils", "build_virtual_pipeline_stages", "v_layout.model.build_in_v", (V_LAYOUT,), SINCE_18,
        "model builder", ("build_model_func", "pg_collection", "vp_size"),
    ),
    Seam(
        HYBRID, "select_pipeline_segment", "v_layout.segments.select_mirrored", (V_LAYOUT,), SINCE_18,
        "the second chunk's segment of HybridModel's pattern", ("main_pattern", "pp_group", "vp_stage"),
    ),
    Seam(
        "megatron.core.transformer.module.MegatronModule", "sharded_state_dict", None, (V_LAYOUT,), KNOWN,
        "of a second chunk, replaced on the chunk: it says where it lies as the mirrored rank does",
    ),
    Seam(
        TRAINING, "build_train_valid_test_data_iterators", ".read_data", (V_LAYOUT, CROSSLINK), KNOWN,
        "data of the second chunk: as on the mirrored pipeline rank, and the partner's",
        ("build_train_valid_test_datasets_provider",),
    ),
    Seam(
        f"{FORMAT}.strategies.fully_parallel", "distribute_main_replicas_with_precomputed_distribution",
        "v_layout.embeddings.save_copies_once", (V_LAYOUT,), KNOWN, "checkpoints with copies of the embedding",
        ("sharded_state_dict", "parallelization_group", "precomputed_distribution"),
    ),
    Seam(
        f"{FORMAT}.serialization", "load", "v_layout.embeddings.load_copies_apart", (V_LAYOUT,), KNOWN,
        "checkpoints with copies of the embedding", ("sharded_state_dict", "checkpoint_dir"),
    ),
    Seam(f"{FORMAT}.dict_utils", "nested_values", None, (FLAGS, V_LAYOUT), KNOWN, "walks over a checkpoint"),
    Seam(f"{FORMAT}.dict_utils", "dict_list_map_inplace", None, (FLAGS, V_LAYOUT), KNOWN, "separates copies"),
    Seam(f"{FORMAT}.mapping", "ShardedTensor", None, (FLAGS, V_LAYOUT), KNOWN, "who saves a copy"),
    Seam(
        "megatron.core.transformer.multi_token_prediction", "MTPLossLoggingHelper", None, (SCHEDULE,), KNOWN,
        "losses of prediction layers",
    ),
    Seam(
        "megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper", "tracker", None, (SCHEDULE,), KNOWN,
        "losses of prediction layers: those of a V are moved to the rank that logs them",
    ),
    Seam(STATE, "get_data_parallel_group", None, (SCHEDULE,), KNOWN, "the replicas: partners, and what losses are averaged over"),
    Seam(STATE, "set_data_parallel_rank", None, (CROSSLINK,), KNOWN, "the partner's data", ("rank",)),
    Seam(STATE, "_MPU_DATA_PARALLEL_RANK", None, (CROSSLINK,), KNOWN, "the rank to go back to"),
)  # fmt: skip

BALANCING = (
    Seam(
        MOE_LAYER, "__init__", ".slots.give_slots", (EPLB,), KNOWN, "slots in place of experts, a dispatcher for them, clones",
        ("self", "config", "submodules", "layer_number", "pg_collection"),
    ),
    Seam(
        MOE_LAYER, "preprocess", ".slots.deal_to_slots", (EPLB,), KNOWN, "the slot map",
        ("self", "hidden_states", "probs", "routing_map"),
    ),
    Seam(
        MOE_LAYER, "postprocess", ".slots.recall_behind", (EPLB,), KNOWN, "takes what was combined: where its backward begins",
        ("self", "output"),
    ),
    Seam(
        f"{MOE}.token_dispatcher", "gather_from_sequence_parallel_region", ".slots.counts.answer_gather", (EPLB,), KNOWN,
        "one gather of counts, not two; there alone, elsewhere the function of that name has other work", ("input_",), alone=True,
    ),
    Seam(f"{MOE}.moe_layer", "MoELayer", None, (EPLB,), KNOWN, "which layers to balance"),
    *(
        Seam(MOE_LAYER, name, None, (EPLB,), KNOWN, why)
        for name, why in {
            "token_dispatcher": "replaced by one of its own class that deals to slots",
            "experts": "homes; forward, backward_dw and train of it hand on to the clones",
            "submodules": "builds clones as experts are built",
            "ep_group": "the expert-parallel ranks",
        }.items()
    ),
    Seam(
        "megatron.core.transformer.multi_token_prediction", "MultiTokenPredictionLayer", None, (EPLB,), KNOWN,
        "numbers of MoE layers in HybridModel's prediction layers",
    ),
    Seam(f"{MOE}.moe_utils", "get_default_pg_collection", None, (EPLB,), KNOWN, "the groups of a layer that was given none"),
    Seam(
        "megatron.core.fp8_utils", "get_fp8_context", None, (EPLB,), KNOWN, "what clones in shared slots take in FP8",
        ("config", "layer_no"),
    ),
    Seam(
        TRAINING, "train_step", ".balancer.wrap_train_step", (EPLB,), KNOWN, "the optimizer of homes that move",
        ("forward_step_func", "data_iterator", "model", "optimizer"),
    ),
    Seam("megatron.core.rerun_state_machine", "RerunMode", None, (EPLB,), KNOWN, "measured passes count for none"),
    Seam(
        SAVING, "save_checkpoint", ".balancer.wrap_save", (EPLB,), KNOWN, "homes in order", ("iteration", "model", "optimizer")
    ),
    Seam(SAVING, "get_checkpoint_name", None, (EPLB,), KNOWN, "where loads are kept", ("checkpoints_path", "iteration")),
    Seam(
        f"{MOE}.moe_logging.MoEMetricsTracker", "report", ".balancer.wrap_report", (EPLB,), SINCE_18, "log line and TensorBoard",
        ("self", "loss_scale", "iteration", "writer"),
    ),
    Seam(
        PARALLEL, "finish_grad_sync", "experts.homecoming.finish_when_home", (EPLB,), KNOWN,
        "gradients of clones are home before it ends", ("self",),
    ),
    Seam(
        BUCKETS, "start_grad_sync", "experts.homecoming.start_when_home", (EPLB,), KNOWN, "and before experts' are reduced",
        ("self",),
    ),
    Seam(PARALLEL, "expert_parallel_bucket_groups", None, (EPLB,), KNOWN, "the reductions of experts' gradients"),
    Seam(PARALLEL, "remove_forward_pre_hook_handles", None, (EPLB,), KNOWN, "whether parameters are gathered behind forwards"),
    Seam(BUCKETS, "finish_param_sync", None, (EPLB,), KNOWN, "homes are gathered before they are sent", ("self",)),
    Seam(STATE, "get_expert_model_parallel_world_size", None, (EPLB,), KNOWN, "whether there is anything to balance"),
    Seam(STATE, "get_expert_data_parallel_group", None, (EPLB,), KNOWN, "the replicas of an expert"),
    Seam(STATE, "get_tensor_and_data_parallel_group", None, (EPLB,), KNOWN, "the ranks that hold the same layers"),
    Seam(OPTIMIZER, "model_param_group_index_map", None, (REHOMING,), KNOWN, "whether a rank has a shard of a parameter's state"),
    Seam(
        OPTIMIZER, "_get_main_param_and_optimizer_states", None, (REHOMING,), KNOWN, "that shard: masters and moments",
        ("self", "model_param"),
    ),
    Seam(
        "megatron.core.optimizer.optimizer.ChainedOptimizer", "chained_optimizers", None, (REHOMING,), KNOWN,
        "the optimizers of a model",
    ),
)  # fmt: skip

# The dry run replaces them in a process of its own.
GPT = "megatron.core.models.gpt"
DRYING = (
    Seam(ARGUMENTS, "validate_args", None, (DRY_RUN,), KNOWN, "Megatron's own checks of a plan's flags", ("args",)),
    Seam(ARGUMENTS, "core_transformer_config_from_args", None, (DRY_RUN,), KNOWN, "the model's config", ("args",)),
    Seam(STATE, "initialize_model_parallel", None, (DRY_RUN,), KNOWN, "all process groups of one rank of many"),
    Seam(STATE, "destroy_model_parallel", None, (DRY_RUN,), KNOWN, "takes them back for the next rank"),
    Seam(STATE, "get_pipeline_model_parallel_rank", None, (DRY_RUN,), KNOWN, "whether a stage has an embedding or a head"),
    Seam("megatron.core.tensor_parallel", "model_parallel_cuda_manual_seed", None, (DRY_RUN,), KNOWN, "generators", ("seed",)),
    Seam("megatron.core.tensor_parallel.random", "CudaRNGStatesTracker", None, (DRY_RUN,), KNOWN, "draws nothing"),
    Seam(GPT, "GPTModel", None, (DRY_RUN,), KNOWN, "a stage"),
    Seam(f"{GPT}.gpt_layer_specs", "get_gpt_decoder_block_spec", None, (DRY_RUN,), KNOWN, "its layers", ("config",)),
    Seam(f"{GPT}.gpt_layer_specs", "get_gpt_decoder_layer_specs", None, (DRY_RUN,), KNOWN, "its layers' kinds", ("config",)),
    Seam(f"{GPT}.gpt_layer_specs", "get_gpt_mtp_block_spec", None, (DRY_RUN,), KNOWN, "its MTP layers", ("config", "spec")),
    Seam(
        f"{MOE}.token_dispatcher", "MoEAlltoAllTokenDispatcher", None, (DRY_RUN,), KNOWN,
        "takes counts of tokens that are supplied",
    ),
    Seam(f"{MOE}.token_dispatcher", "sort_chunks_by_idxs", None, (DRY_RUN,), KNOWN, "leaves a copy behind", ("input",)),
    Seam(
        "megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd", None, (DRY_RUN,), KNOWN,
        "keeps what its fused kernel keeps", ("t", "freqs"),
    ),
    *(
        Seam(f"{GPT}.experimental_attention_variant_module_specs", symbol, None, (DRY_RUN,), WITH_DELTA, why, ("config",))
        for symbol, why in (
            ("get_transformer_block_with_experimental_attention_variant_spec", "layers of a model with linear attention"),
            ("get_transformer_layer_with_experimental_attention_variant_spec", "their kinds"),
        )
    ),
    *(
        Seam(f"megatron.core.ssm.gated_delta_net.{place}", symbol, None, (DRY_RUN,), WITH_DELTA, why)
        for place, symbol, why in (
            ("common", "HAVE_FLA", "linear attention wants kernels that are not run"),
            ("common", "l2norm", "keeps what its kernel keeps"),
            ("common", "_GDNBase", "its norm and decay keep what compiled ones keep"),
            ("gdn", "causal_conv1d", "keeps what its kernel keeps"),
            ("gdn", "chunk_gated_delta_rule", "keeps what its kernel keeps"),
        )
    ),
)  # fmt: skip

SEAMS = (*STARTING, *STEPPING, *SPLITTING, *PAIRING, *TURNING, *BALANCING, *DRYING)


def find_version() -> str:
    """Return the version of the Megatron-Core in use."""
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return "not installed"
    return str(__version__)


def list_seams() -> list[Seam]:
    """Return the seams of the Megatron version in use, and of what is installed beside it."""
    version = find_version()
    due = [seam for seam in SEAMS if version == "not installed" or seam.is_due(version, KNOWN)]
    # megatron.core can be installed without its trainer, and without DeepEP.
    missing = tuple(name for name in (TRAINER, DEEP_EP) if version == "not installed" or not importlib.util.find_spec(name))
    return [seam for seam in due if not seam.owner.startswith(missing)]


def check_seams(features: Collection[str] = tuple(REMEDIES)) -> None:
    """Raise `SeamError`, which names version, symbol and remedy, if a seam of these features does not fit."""
    supported = f"megatron-core {KNOWN[0]} to {KNOWN[-1]}"
    check_all(list_seams(), features, f"megatron-core {find_version()}", supported, REMEDIES)
