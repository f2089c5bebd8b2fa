"""All symbols of DeepSpeed, and of torch for its models, that the plugin replaces, extends, calls or reads.

``wrap`` is the name of a function of this package, or, with a dot before it, of an attribute of the run's `Installation`.
"""

from collections.abc import Collection

from counterflow.trainer.seam import Seam, list_used
from counterflow.trainer.seam import check_seams as check_all
from counterflow.trainer.split_seams import list_split_seams
from counterflow.version import find_package

CONFIG, SCHEDULE, ZERO_BUBBLE = "DeepSpeed's JSON", "DeepSpeed's schedule", "DeepSpeed's zero bubble"
EXPERTS = "DeepSpeed's clones of experts"
OVERLAP = "DeepSpeed's overlapped pairs"
REMEDIES = {
    CONFIG: "run the script without counterflow",
    SCHEDULE: 'drop "schedule" from the key "counterflow"',
    ZERO_BUBBLE: 'give "zero_bubble": false in the key "counterflow"',
    EXPERTS: 'drop "eplb" from the key "counterflow"',
    OVERLAP: 'drop "overlap" from the key "counterflow"',
}
KNOWN = ("0.19",)

MODULE, ENGINE = "deepspeed.runtime.pipe.module", "deepspeed.runtime.pipe.engine"
PIPE_MODULE, PIPE_ENGINE = f"{MODULE}.PipelineModule", f"{ENGINE}.PipelineEngine"
ENGINE_BASE = "deepspeed.runtime.engine.DeepSpeedEngine"
ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
AUTOEP = "deepspeed.module_inject.auto_ep_layer.AutoEPMoELayer"

STARTING = (
    Seam("deepspeed", "initialize", ".read_config", (CONFIG,), KNOWN, "the config, before an engine is made",
         ("args", "model", "optimizer", "model_parameters")),
    Seam(ENGINE_BASE, "save_checkpoint", "checkpoint.stamp_after", (CONFIG,), KNOWN, "says how a pipeline was cut",
         ("self", "save_dir", "tag")),
    Seam(ENGINE_BASE, "load_checkpoint", "checkpoint.guard", (CONFIG,), KNOWN, "refuses optimizer states of another cut",
         ("self", "load_dir", "tag", "load_module_strict", "load_optimizer_states")),
    Seam(PIPE_MODULE, "_partition_layers", "pipeline.module.note_method", (CONFIG,), KNOWN,
         "how a model was cut into stages, which upstream forgets", ("self", "method")),
)  # fmt: skip

STEPPING = (
    Seam(PIPE_ENGINE, "__init__", ".choose_engine", (SCHEDULE,), KNOWN, "the engine of a model with a schedule"),
    Seam(PIPE_MODULE, "_build", None, (SCHEDULE,), KNOWN, "builds the layers of a chunk that other ranks held", ("self",)),
    *list_used(PIPE_MODULE, (SCHEDULE,), KNOWN, {
        "stage_owner": "extended: the rank that holds a layer",
        "save_state_dict": "extended: saves every chunk",
        "load_state_dir": "extended: loads every chunk",
        "compile": "extended: compiles every chunk",
        "_precompute_checkpointable_values": "extended: which layers of every chunk are recomputed",
        "_index_tied_modules": "the groups of ranks that hold a tied layer",
        "_synchronize_tied_weights": "tied layers are alike on all their ranks",
    }),
    *list_used(PIPE_ENGINE, (SCHEDULE,), KNOWN, {
        "_train_schedule": ("extended: says that a training step is due", ("self",)),
        "_inference_schedule": ("extended: says that an evaluation is due", ("self", "micro_batches")),
        "_exec_schedule": ("extended: runs the table in place of instructions", ("self", "pipe_schedule")),
        "_loss_stage_global_rank": ("extended: the rank of the last stage", ("self",)),
        "clip_fp32_gradients": ("extended: clips by the norm of the whole model", ("self",)),
        "is_first_stage": ("extended: asked for the chunk that runs", ("self",)),
        "is_last_stage": ("extended: asked for the chunk that runs", ("self",)),
        "_next_batch": ("extended: on cross-linked replicas labels are the partner's", ("self",)),
        "reset_activation_shape": ("extended: the next step announces shapes anew", ("self",)),
        "_exec_load_micro_batch": ("called for each micro-batch", ("self", "buffer_id")),
        "_exec_forward_pass": ("called for each F", ("self", "buffer_id")),
        "_exec_backward_pass": ("called for each B of the last stage", ("self", "buffer_id")),
        "_exec_reduce_tied_grads": ("called after the table", ("self",)),
        "_exec_reduce_grads": ("called after the table", ("self",)),
        "_exec_optimizer_step": ("called after the table", ("self",)),
    }),
)  # fmt: skip

SPLITTING = (
    *list_split_seams(ZERO_BUBBLE, KNOWN),
    Seam(ZERO, "process_gradients", None, (ZERO_BUBBLE,), KNOWN,
         "takes a weight's gradient after the W", ("self", "param", "i")),
    Seam("deepspeed.runtime.bf16_optimizer.BF16_Optimizer", "_update_hp_grad", None, (ZERO_BUBBLE,), KNOWN,
         "takes a weight's gradient after the W", ("self", "lp", "group_idx", "param_idx", "clear_lp_grads")),
)  # fmt: skip

BALANCING = (
    Seam(AUTOEP, "_forward", "experts.layer.deal_to_slots", (EXPERTS,), KNOWN, "runs a layer on slots",
         ("self", "hidden_states")),
    *list_used(AUTOEP, (EXPERTS,), KNOWN, {
        "num_experts": "slots in place of experts",
        "num_local_experts": "slots in place of experts",
        "router": "called before tokens are dealt to slots",
        "experts": "the homes; their class makes the clones",
        "async_split_plan": "off: slots are known after the router",
        "ep_group": "the ranks that clones are sent among",
    }),
    Seam(ENGINE_BASE, "forward", "experts.balancing.begin_before", (EXPERTS,), KNOWN, "clones get weights before a step"),
    *(
        Seam(ENGINE_BASE, symbol, "experts.balancing.end_before", (EXPERTS,), KNOWN, "gradients of clones come home before it")
        for symbol in ("allreduce_gradients", "buffered_allreduce_fallback")
    ),
    Seam(ENGINE_BASE, "save_16bit_model", "experts.balancing.save_at_home", (EXPERTS,), KNOWN, "homes are in order",
         ("self", "save_dir")),
    Seam(ENGINE_BASE, "_report_progress", "experts.balancing.report_after", (EXPERTS,), KNOWN, "the log's line",
         ("self", "step")),
    Seam(ZERO, "reduce_ready_partitions_and_remove_grads", "experts.balancing.wait_for_clones", (EXPERTS,), KNOWN,
         "an expert's gradient waits for those of its clones", ("self", "param", "i")),
    Seam("deepspeed.module_inject.auto_ep.AutoEP", "_raise_no_moe_layers_detected", "stages.let_stages_be_dense",
         (EXPERTS, SCHEDULE), KNOWN, "a stage may have no MoE layers", ("self", "presets_to_try")),
    Seam(ZERO, "scaled_global_norm", "stages.count_stages_alike", (EXPERTS, SCHEDULE), KNOWN,
         "stages with and without MoE layers sum their norms once", ("self", "norm_type")),
    Seam(ZERO, "_model_parallel_all_reduce", "stages.leave_to_one_sum", (EXPERTS, SCHEDULE), KNOWN,
         "upstream sums once for each group of parameters, whose number differs by stage", ("self", "tensor", "op")),
)  # fmt: skip

PAIRING = (
    Seam("deepspeed.comm.comm", "all_to_all_single", "pipeline.overlap.hand_over_in", (OVERLAP,), KNOWN,
         "the other part of a pair computes meanwhile"),
    Seam("deepspeed.runtime.activation_checkpointing.checkpointing", "get_cuda_rng_tracker", None, (OVERLAP,), KNOWN,
         "each part of a pair has its own random states"),
)  # fmt: skip

SEAMS = (*STARTING, *STEPPING, *SPLITTING, *BALANCING, *PAIRING)


def list_seams() -> list[Seam]:
    """Return the seams of the DeepSpeed version that is installed; none without DeepSpeed."""
    version = find_package("deepspeed")
    return [] if version is None else [seam for seam in SEAMS if seam.is_due(version, KNOWN)]


def check_seams(features: Collection[str]) -> None:
    """Raise `SeamError`, which names version, symbol and remedy, if a seam of these features does not fit."""
    check_all(list_seams(), features, f"deepspeed {find_package('deepspeed')}", f"deepspeed {KNOWN[0]}", REMEDIES)
