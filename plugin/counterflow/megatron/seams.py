"""Where the plugin enters Megatron: one entry per upstream symbol, checked before it is touched.

A seam names the symbol, the parameters it must have and the wrapper that takes its place. Where a
version of Megatron has no such symbol, an alternative may stand in; a symbol of another shape stops
the start with the version and the symbol named.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from counterflow.errors import SeamError
from counterflow.patching import Patches

TRAINER = "megatron.training"


@dataclass(frozen=True)
class Seam:
    """An upstream symbol that the plugin takes.

    ``optional`` marks a symbol that only newer versions have, beside an older path that is kept; ``only_with`` names the option
    without which it is not touched. What is called ``by_name`` may have its parameters in any order, and more that have defaults.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    purpose: str
    optional: bool = False
    only_with: str | None = None
    by_name: bool = False

    def find_misfit(self) -> str | None:
        """Return what is wrong with the symbol; None where it fits or may be absent."""
        if self.module.startswith(TRAINER) and importlib.util.find_spec(TRAINER) is None:
            return None  # a loop of its own over megatron.core, without megatron.training
        try:
            home = importlib.import_module(self.module)
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and self.module.startswith(error.name or "\0")
            return None if self.optional and absent else f"cannot be imported: {error}"
        target = self._find(home)
        if target is None:
            return None if self.optional else "does not exist"
        found = inspect.signature(inspect.unwrap(target)).parameters
        if not self._accepts(found):
            return f"takes ({', '.join(found)}) where ({', '.join(self.parameters)}, …) is expected"
        return None

    def _accepts(self, found: Mapping[str, inspect.Parameter]) -> bool:
        if not self.by_name:
            return tuple(found)[: len(self.parameters)] == self.parameters
        unnamed = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        needed = {name for name, one in found.items() if one.default is one.empty and one.kind not in unnamed}
        given = set(self.parameters)
        return needed <= given and given <= {name for name, one in found.items() if one.kind not in unnamed}

    def is_present(self) -> bool:
        """Tell whether this version of Megatron has the symbol."""
        try:
            return self._find(importlib.import_module(self.module)) is not None
        except ImportError:
            return False

    def _find(self, home: Any) -> Any:
        for name in self.symbol.split("."):
            home = getattr(home, name, None)
        return home


ADD_ARGUMENTS = Seam("megatron.training.arguments", "add_megatron_arguments", ("parser",), "flags in the script's --help")
PARSE_ARGS = Seam(
    "megatron.training.arguments", "parse_args", ("extra_args_provider", "ignore_unknown_args"), "options and early refusals"
)
GET_SCHEDULE = Seam(
    "megatron.core.pipeline_parallel.schedules", "get_forward_backward_func", ("pp_size", "vp_size"), "the pipeline schedule"
)
OWN_TRANSFERS = Seam(
    "megatron.core.pipeline_parallel.schedules",
    "P2PCommunicator",
    ("pp_group", "config"),
    "made by Megatron's own pipelined schedules alone: they do not run in place of the chosen one",
)
FORWARD_STEP = Seam(
    "megatron.core.pipeline_parallel.schedules",
    "forward_step",
    ("forward_step_func", "data_iterator", "model", "num_microbatches", "input_tensor", "forward_data_store", "config"),
    "called for each F",
)
BACKWARD_STEP = Seam(
    "megatron.core.pipeline_parallel.schedules",
    "backward_step",
    ("input_tensor", "output_tensor", "output_tensor_grad", "config"),
    "called for each B",
)
GET_SHAPES = Seam(
    "megatron.core.pipeline_parallel.schedules",
    "get_tensor_shapes",
    ("seq_length", "micro_batch_size", "decoder_seq_length", "config", "tp_group", "cp_group"),
    "shape of what the ranks send each other",
)
CHECK_FIRST = Seam(
    "megatron.core.pipeline_parallel.schedules", "check_first_val_step", ("first_val_step", "forward_only", "cond"), "FP8 caches"
)
FREE_OUTPUT = Seam(
    "megatron.core.pipeline_parallel.schedules",
    "deallocate_output_tensor",
    ("out", "deallocate_pipeline_outputs"),
    "frees what has been sent",
)
SET_RANK = Seam("megatron.core.parallel_state", "set_pipeline_model_parallel_rank", ("rank",), "V layout, mirrored rank")
SET_DATA_RANK = Seam("megatron.core.parallel_state", "set_data_parallel_rank", ("rank",), "full DualPipe, the partner's data")
MAKE_GROUPS = Seam(
    "megatron.core.parallel_state",
    "initialize_model_parallel",
    ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    "V layout, copies of the embedding",
)
GET_MODEL = Seam(
    "megatron.training.training", "get_model", ("model_provider_func", "model_type", "wrap_with_ddp"), "V layout, model provider"
)
BUILD_STAGES = Seam(
    "megatron.training.models.dist_utils",
    "build_virtual_pipeline_stages",
    ("build_model_func", "pg_collection", "vp_size"),
    "V layout, model builder (0.18 and later)",
    optional=True,
)
BUILD_ITERATORS = Seam(
    "megatron.training.training",
    "build_train_valid_test_data_iterators",
    ("build_train_valid_test_datasets_provider",),
    "V layout, data sets",
)
COMBINED_STEP = Seam(
    "megatron.core.pipeline_parallel.combined_1f1b",
    "combined_forward_backward_step",
    (
        "forward_step_func",
        "data_iterator",
        "f_model",
        "num_microbatches",
        "input_tensor",
        "forward_data_store",
        "b_model",
        "b_input_tensor",
        "b_output_tensor",
        "b_output_tensor_grad",
        "config",
        "f_model_chunk_id",
        "is_first_microbatch",
        "current_microbatch",
    ),  # fmt: skip
    "F, B and F&B under --cf-overlap",
    only_with="overlap",
    by_name=True,
)
SAVE_SHARDS = Seam(
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "distribute_main_replicas_with_precomputed_distribution",
    ("sharded_state_dict", "parallelization_group", "precomputed_distribution"),
    "V layout, checkpoints with copies of the embedding",
)
COUNT_MICROBATCHES = Seam(
    "megatron.core.num_microbatches_calculator",
    "_build_num_microbatches_calculator",
    ("rank", "global_batch_size", "micro_batch_size", "data_parallel_size", "decrease_batch_size_if_needed"),
    "batch sizes that a run will have",
)
SKIP_STEP = Seam("megatron.training.training", "dummy_train_step", ("data_iterator",), "skipped iterations of several chunks")
SAVE_LOADER = Seam(
    "megatron.training.checkpointing",
    "maybe_save_dataloader_state",
    ("train_iterator", "iteration", "dataloader_save_path"),
    "data loaders of several chunks",
)
LOAD_SHARDS = Seam(
    "megatron.core.dist_checkpointing.serialization",
    "load",
    ("sharded_state_dict", "checkpoint_dir"),
    "V layout, checkpoints with copies of the embedding",
)
LOAD_CHECKPOINT = Seam(
    "megatron.training.checkpointing", "_load_base_checkpoint", ("load_dir", "args"), "optimizer state of another layout"
)

SPLIT_LINEAR = Seam(
    "megatron.core.tensor_parallel.layers",
    "LinearWithGradAccumulationAndAsyncCommunication.forward",
    (
        "ctx", "input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel",
        "grad_output_buffer", "wgrad_deferral_limit", "tp_group",
    ),
    "zero bubble: weight gradients of local linears",
)  # fmt: skip
MOE_LAYER = Seam(
    "megatron.core.transformer.moe.moe_layer",
    "MoELayer.__init__",
    ("self", "config", "submodules", "layer_number", "pg_collection"),
    "expert balancing: slots in place of experts",
)
DEAL_TOKENS = Seam(
    "megatron.core.transformer.moe.moe_layer",
    "MoELayer.preprocess",
    ("self", "hidden_states", "probs", "routing_map"),
    "expert balancing: the slot map",
)
GATHER_COUNTS = Seam(
    "megatron.core.transformer.moe.token_dispatcher",
    "gather_from_sequence_parallel_region",
    ("input_",),
    "expert balancing: one gather of counts, not two",
)
TRAIN_STEP = Seam(
    "megatron.training.training",
    "train_step",
    ("forward_step_func", "data_iterator", "model", "optimizer"),
    "expert balancing: the optimizer of homes that move",
)
SAVE_CHECKPOINT = Seam(
    "megatron.training.checkpointing", "save_checkpoint", ("iteration", "model", "optimizer"), "expert balancing: homes in order"
)
REPORT_MOE = Seam(
    "megatron.core.transformer.moe.moe_logging",
    "MoEMetricsTracker.report",
    ("self", "loss_scale", "iteration", "writer"),
    "expert balancing: log line and TensorBoard (0.18 and later)",
    optional=True,
)

SEAMS = (
    ADD_ARGUMENTS,
    PARSE_ARGS,
    GET_SCHEDULE,
    OWN_TRANSFERS,
    FORWARD_STEP,
    BACKWARD_STEP,
    GET_SHAPES,
    CHECK_FIRST,
    FREE_OUTPUT,
    SET_RANK,
    SET_DATA_RANK,
    MAKE_GROUPS,
    GET_MODEL,
    BUILD_STAGES,
    BUILD_ITERATORS,
    COMBINED_STEP,
    SAVE_SHARDS,
    COUNT_MICROBATCHES,
    SKIP_STEP,
    SAVE_LOADER,
    LOAD_SHARDS,
    LOAD_CHECKPOINT,
    SPLIT_LINEAR,
    MOE_LAYER,
    DEAL_TOKENS,
    GATHER_COUNTS,
    TRAIN_STEP,
    SAVE_CHECKPOINT,
    REPORT_MOE,
)


def find_version() -> str:
    """Return the version of the Megatron-Core in use."""
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        return "not installed"
    return str(__version__)


def check_seams(option: str | None = None) -> None:
    """Raise `SeamError` that names version and symbol unless every seam fits, of those that go ``only_with`` the option."""
    dropped = "the --cf flags" if option is None else f"--cf-{option}"
    for seam in SEAMS:
        if seam.only_with == option and (misfit := seam.find_misfit()):
            raise SeamError(
                f"megatron-core {find_version()}: {seam.module}.{seam.symbol} {misfit}; "
                "this version of counterflow supports megatron-core 0.17 to 0.20: install one of them and what it imports, "
                f"or drop {dropped}"
            )


def take(patches: Patches, seam: Seam, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap(original)`` in the symbol's place, wherever it was imported; nothing where there is no such symbol."""
    if seam.is_present():
        patches.replace(importlib.import_module(seam.module), seam.symbol, wrap)
