"""Where the plugin enters Megatron: one entry per upstream symbol, checked before it is touched.

A seam names the symbol, the parameters it must have and the wrapper that takes its place. Where a
version of Megatron has no such symbol, an alternative may stand in; a symbol of another shape stops
the start with the version and the symbol named.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from counterflow.config import UNSPLIT_SCHEDULES, Options, add_flags, fail, merge_options, read_mapping
from counterflow.errors import CounterflowError, OptionError, SeamError
from counterflow.patching import Patches
from counterflow.schedule.layouts import V


@dataclass(frozen=True)
class Seam:
    """An upstream symbol that the plugin takes.

    ``optional`` marks a symbol that only newer versions have, beside an older path that is kept.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    purpose: str
    optional: bool = False

    def find_misfit(self) -> str | None:
        """Return what is wrong with the symbol; None where it fits or may be absent."""
        try:
            home = importlib.import_module(self.module)
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and self.module.startswith(error.name or "\0")
            return None if self.optional and absent else f"cannot be imported: {error}"
        target = self._find(home)
        if target is None:
            return None if self.optional else "does not exist"
        found = tuple(inspect.signature(inspect.unwrap(target)).parameters)
        if found[: len(self.parameters)] != self.parameters:
            return f"takes ({', '.join(found)}) where ({', '.join(self.parameters)}, …) is expected"
        return None

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
    ),  # fmt: skip
    "F, B and F&B under --cf-overlap",
)
SAVE_SHARDS = Seam(
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "distribute_main_replicas_with_precomputed_distribution",
    ("sharded_state_dict", "parallelization_group", "precomputed_distribution"),
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


def check_seams() -> None:
    """Raise `SeamError` that names version and symbol unless every seam fits."""
    for seam in SEAMS:
        if misfit := seam.find_misfit():
            raise SeamError(
                f"megatron-core {find_version()}: {seam.module}.{seam.symbol} {misfit}; "
                "this version of counterflow supports megatron-core 0.17 to 0.19: install one of them and what it imports, "
                "or drop the --cf flags"
            )


def _take(patches: Patches, seam: Seam, wrap: Callable[[Any], Any]) -> None:
    patches.replace(importlib.import_module(seam.module), seam.symbol, wrap)


def install_flags(patches: Patches, options: Options) -> None:
    """Show the flags in the script's ``--help``; set up the schedule once the arguments are read."""
    check_seams()
    _take(patches, ADD_ARGUMENTS, _show_flags)
    _take(patches, PARSE_ARGS, lambda original: _prepare_after(original, patches, options))


def _show_flags(add_arguments: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(add_arguments)
    def add_arguments_and_flags(parser: Any) -> Any:
        parser = add_flags(add_arguments(parser))
        # A bare % in one of upstream's help texts (0.19.2 has one) breaks --help for all flags.
        formatter = parser._get_formatter()
        for action in parser._actions:
            try:
                formatter._expand_help(action)
            except (ValueError, TypeError):
                action.help = action.help.replace("%", "%%")
        return parser

    return add_arguments_and_flags


def _prepare_after(parse_args: Callable[..., Any], patches: Patches, options: Options) -> Callable[..., Any]:
    is_installed = False

    @wraps(parse_args)
    def parse_and_prepare(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_installed
        from counterflow.megatron.checks import has_balancing, prepare_arguments

        parsed = parse_args(*args, **kwargs)
        try:
            chosen = _merge_yaml(parsed, options)
            prepare_arguments(parsed, chosen)
        except CounterflowError as error:
            fail(error, parsed.rank)
        # Into the arguments, and so into every checkpoint: the next load knows the layout of this one.
        for name, value in chosen.model_dump(mode="json").items():
            setattr(parsed, f"cf_{name}", value)
        # Megatron parses again for its fault tolerance; wrapping twice would mirror a V back to a loop.
        if not is_installed:
            if chosen.schedule is not None:
                install_schedule(patches, chosen, parsed)
            if has_balancing(parsed, chosen):
                install_balancing(patches, chosen)
            is_installed = True
        return parsed

    return parse_and_prepare


def _merge_yaml(parsed: Any, options: Options) -> Options:
    """Add the ``counterflow:`` section of a ``--yaml-cfg`` file; a flag given on the command line wins."""
    section = getattr(parsed, "counterflow", None)
    if section is None:
        return options
    given = read_mapping(vars(section))
    if given.platform != "auto":
        raise OptionError(
            f"platform: {given.platform} stands in the YAML file, which is read after the platform is chosen: "
            f"give --cf-platform {given.platform} on the command line"
        )
    return merge_options(given, options)


def install_schedule(patches: Patches, options: Options, args: Any) -> None:
    """Take the schedule, split backward passes, and for a V the builders, data sets and checkpoint check."""
    from counterflow.megatron.checkpoint import refuse_other_layout
    from counterflow.megatron.crosslink import read_partners_data
    from counterflow.megatron.embeddings import keep_embeddings_on_first_rank, save_copies_once
    from counterflow.megatron.model import lay_out_as_v, mirror_dataset_provider
    from counterflow.megatron.schedule import PipelineSchedule
    from counterflow.megatron.tables import choose_layout, count_replicas, name_model_layout
    from counterflow.megatron.zero_bubble import delay_engine_weight_grads, find_engine_obstacle, split_local_linears

    if options.zero_bubble is not False and (options.overlap or options.schedule not in UNSPLIT_SCHEDULES):
        split_local_linears(patches)
        if getattr(args, "transformer_impl", "") == "transformer_engine" and find_engine_obstacle(args) is None:
            delay_engine_weight_grads(patches)
    pipeline = PipelineSchedule(options)
    _take(patches, GET_SCHEDULE, lambda original: _choose_schedule(original, pipeline))
    _take(patches, LOAD_CHECKPOINT, refuse_other_layout)
    if options.overlap:
        from counterflow.megatron.overlap import defer_inside_plans

        defer_inside_plans(patches)
    layout = choose_layout(options, 2, 2)
    if name_model_layout(layout) == V:
        _take(patches, MAKE_GROUPS, keep_embeddings_on_first_rank)
        _take(patches, SAVE_SHARDS, save_copies_once)
        _take(patches, GET_MODEL, lambda original: _wrap_first(original, lay_out_as_v))
        if BUILD_STAGES.is_present():
            _take(patches, BUILD_STAGES, lambda original: _wrap_first(original, lay_out_as_v))
        _take(patches, BUILD_ITERATORS, lambda original: _wrap_first(original, mirror_dataset_provider))
    if count_replicas(layout) > 1:
        _take(patches, BUILD_ITERATORS, read_partners_data)


def install_balancing(patches: Patches, options: Options) -> None:
    """Give MoE layers slots, and take the steps around which clones are filled; after the schedule, which it wraps."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from counterflow.megatron.balancing import ExpertBalancer
    from counterflow.megatron.checkpoint import refuse_other_experts
    from counterflow.megatron.experts import answer_from_shares, deal_to_slots, give_slots

    balancer = ExpertBalancer(options)
    is_exact = options.eplb_split == "exact"
    build = give_slots(MoELayer.__init__, options.eplb_clones_per_rank, is_exact=is_exact)
    patches.set(MoELayer, "__init__", build)
    patches.set(MoELayer, "preprocess", deal_to_slots(MoELayer.preprocess))
    # There alone: elsewhere the function of that name has other work.
    name = GATHER_COUNTS.symbol
    patches.set(token_dispatcher, name, answer_from_shares(getattr(token_dispatcher, name)))
    _take(patches, GET_SCHEDULE, lambda original: _balance_schedule(original, balancer))
    _take(patches, TRAIN_STEP, balancer.wrap_train_step)
    _take(patches, SAVE_CHECKPOINT, balancer.wrap_save)
    _take(patches, LOAD_CHECKPOINT, refuse_other_experts)
    if REPORT_MOE.is_present():
        from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

        patches.set(MoEMetricsTracker, "report", balancer.wrap_report(MoEMetricsTracker.report))


def _balance_schedule(original: Callable[..., Any], balancer: Any) -> Callable[..., Any]:
    @wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return balancer.wrap_schedule(original(*args, **kwargs))

    return get_forward_backward_func


def _wrap_first(function: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    """Call ``function`` with its first argument, by position or by name, wrapped."""
    name = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            return function(*args, **{**kwargs, name: wrap(kwargs[name])})
        return function(wrap(args[0]), *args[1:], **kwargs)

    return wrapped


def _choose_schedule(original: Callable[..., Any], pipeline: Any) -> Callable[..., Any]:
    @wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.pipeline_parallel import schedules

        if type(kwargs.get("schedule_pg_collection")).__name__ == "MultiModuleProcessGroupCollection":
            raise OptionError("--cf-schedule does not run models of several pipelines (multi-module process groups): drop it")
        chosen = original(*args, **kwargs)
        # Asked for a model without a pipeline (a separate one, say), upstream's choice stands.
        return chosen if chosen is schedules.forward_backward_no_pipelining else pipeline.forward_backward

    return get_forward_backward_func
