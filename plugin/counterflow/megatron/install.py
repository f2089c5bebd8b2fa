"""Put options in force: at once where all of them are known, else when Megatron has read its YAML file.

The seams of schedule and balancing go in with the options, so any loop over ``megatron.core`` runs under them. What needs to
know the run is checked on the arguments of ``megatron.training`` when they are parsed, or, in another loop, on the model's
config in the first step (`counterflow.megatron.checks`).
"""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.errors import CounterflowError, OptionError
from counterflow.megatron import seams
from counterflow.megatron.loop import find_arguments
from counterflow.megatron.seams import check_seams, take
from counterflow.options import (
    Given,
    Options,
    add_flags,
    fail,
    merge_options,
    name_flag,
    read_flags,
    read_given,
)
from counterflow.patching import Patches
from counterflow.runtime.recorder import check_folder
from counterflow.schedule.layouts import V

YAML_FLAG = "--yaml-cfg"


class Installation:
    """The options in force in this process and what was installed for them; ``patches`` takes it all back."""

    def __init__(self, patches: Patches, given: Given, flags: Given) -> None:
        self.patches = patches
        # None while a YAML file may add to them.
        self.options: Options | None = None
        self._given, self._flags = given, flags
        self._parsed: tuple[Given, Given] | None = None
        self._is_reader_asked = False

    def put_in_force(self, options: Options) -> None:
        """Install what the options ask for."""
        if options.record is not None:
            check_folder("--cf-record", options.record)
        if options.schedule is not None:
            install_schedule(self.patches, options, self._check_model)
        if options.eplb:
            install_balancing(self.patches, options)
        self.options = options

    def find_data_rank(self, chunk: int) -> int:
        """Return the data-parallel rank whose samples a chunk reads: this one, or on the way back across replicas the partner."""
        from counterflow.megatron.pipeline.crosslink import find_partner
        from counterflow.megatron.v_layout.model import WAY_BACK

        self._is_reader_asked = True
        return find_partner() if self._is_linked() and chunk == WAY_BACK else get_data_rank()

    def _is_linked(self) -> bool:
        from counterflow.trainer.tables import choose_layout, count_replicas

        if self.options is None or self.options.schedule is None:
            return False
        return count_replicas(choose_layout(self.options, 2, 2)) > 1

    def _check_model(self, chunks: list[Any]) -> None:
        """Before the first step: refuse what was not built for the schedule."""
        from counterflow.megatron.checks import check_chunks, check_loop

        assert self.options is not None
        if find_arguments() is None:
            check_loop(chunks, self.options)
            if self._is_linked() and not self._is_reader_asked:
                raise OptionError(
                    f"--cf-schedule {self.options.schedule} computes each loss in the partner replica: give chunk 1 a data "
                    "iterator over the samples of data-parallel rank counterflow.find_data_rank(1), chunk 0 one over those of "
                    "counterflow.find_data_rank(0)"
                )
        check_chunks(chunks, self.options)

    def require_same(self, asked: Given) -> None:
        """Raise `OptionError` where what is asked for now is not in force."""
        current = self.options or Options.model_construct(**(self._given | self._flags))
        for name, value in asked.items():
            if value != (in_force := getattr(current, name)):
                raise OptionError(
                    f"{name_flag(name)} {value} is asked for and counterflow is on already with {in_force} (by the launcher, an "
                    "earlier enable() or an earlier run of this process): give all options in one place, or take the first "
                    "back with .undo() on what its enable() returned"
                )

    def take_arguments(self, parsed: Any) -> None:
        """Check the arguments of ``megatron.training``, and write into them what is in force."""
        from counterflow.megatron.checks import prepare_arguments

        yaml, flags = read_yaml(parsed), read_flags(sys.argv[1:])
        if self._parsed is None:
            merged = merge_options(yaml, self._given, self._flags | flags)
            if self.options is None:
                self.put_in_force(merged)
            self.require_same(merged.model_dump())
            self._delay_engine(parsed)
        elif self._parsed != (yaml, flags):
            # Of the two trainings each asks for what it names; the rest is the default.
            self.require_same(merge_options(yaml, self._given, flags).model_dump())
        self._parsed = yaml, flags
        assert self.options is not None
        prepare_arguments(parsed, self.options)
        # Into the arguments, and so into every checkpoint: the next load knows the layout of this one.
        for name, value in self.options.model_dump(mode="json").items():
            setattr(parsed, f"cf_{name}", value)

    def _delay_engine(self, parsed: Any) -> None:
        from counterflow.megatron.pipeline.zero_bubble import delay_engine_weight_grads, find_engine_obstacle

        assert self.options is not None
        is_engine = getattr(parsed, "transformer_impl", "") == "transformer_engine"
        if splits_backward(self.options) and is_engine and find_engine_obstacle(parsed) is None:
            delay_engine_weight_grads(self.patches)


def install(patches: Patches, given: Given, flags: Given) -> Installation:
    """Install the plugin: its flags in the script's ``--help``, and all that the options ask for as soon as all are known."""
    check_seams()
    installation = Installation(patches, given, flags)
    take(patches, seams.ADD_ARGUMENTS, _show_flags)
    take(patches, seams.PARSE_ARGS, lambda original: _prepare_after(original, installation))
    if not any(argument.split("=", 1)[0] == YAML_FLAG for argument in sys.argv[1:]):
        installation.put_in_force(merge_options(given, flags))
    return installation


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


def _prepare_after(parse_args: Callable[..., Any], installation: Installation) -> Callable[..., Any]:
    @wraps(parse_args)
    def parse_and_prepare(*args: Any, **kwargs: Any) -> Any:
        parsed = parse_args(*args, **kwargs)
        try:
            installation.take_arguments(parsed)
        except CounterflowError as error:
            fail(error, parsed.rank)
        return parsed

    return parse_and_prepare


def read_yaml(parsed: Any) -> Given:
    """Return what the ``counterflow:`` section of a ``--yaml-cfg`` file gives."""
    section = getattr(parsed, "counterflow", None)
    if section is None:
        return {}
    given = read_given(vars(section) if hasattr(section, "__dict__") else section)
    if given.get("platform", "auto") != "auto":
        raise OptionError(
            f"platform: {given['platform']} stands in the YAML file, which is read after the platform is chosen: "
            f"give --cf-platform {given['platform']} on the command line"
        )
    return given


def splits_backward(options: Options) -> bool:
    """Tell whether linears are to leave weight gradients for later: to the W, or, in a pair, to its layer's end."""
    return options.zero_bubble is not False and (options.overlap or options.family is None or options.family.splits)


def get_data_rank() -> int:
    """Return this rank's place among the data-parallel replicas."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def install_schedule(patches: Patches, options: Options, check_model: Callable[[list[Any]], None]) -> None:
    """Take the schedule, split backward passes, and for a V the builders, data sets and checkpoint check.

    ``check_model`` is shown the model's chunks before their first step.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from counterflow.megatron.checkpoint import refuse_batches_ahead, refuse_other_layout
    from counterflow.megatron.pipeline.crosslink import read_partners_data
    from counterflow.megatron.pipeline.iterators import draw_from_every_chunk, save_first_chunks_loader
    from counterflow.megatron.pipeline.schedule import PipelineSchedule
    from counterflow.megatron.pipeline.zero_bubble import split_local_linears
    from counterflow.megatron.v_layout.embeddings import keep_embeddings_on_first_rank, load_copies_apart, save_copies_once
    from counterflow.megatron.v_layout.model import lay_out_as_v, mirror_dataset_provider
    from counterflow.trainer.tables import choose_layout, count_replicas, name_model_layout

    layout = choose_layout(options, 2, 2)
    is_v = name_model_layout(layout) == V
    if is_v and parallel_state.model_parallel_is_initialized():
        raise OptionError(
            f"--cf-schedule {options.schedule} makes process groups of its own for copies of the embedding and Megatron's are "
            "made already: call counterflow.enable() before initialize_model_parallel()"
        )
    if splits_backward(options):
        split_local_linears(patches)
    run = _check_first(PipelineSchedule(options).forward_backward, check_model)
    take(patches, seams.GET_SCHEDULE, lambda original: _choose_schedule(original, run, options))
    patches.set(schedules, seams.OWN_TRANSFERS.symbol, _refuse_own_schedules(options))
    take(patches, seams.LOAD_CHECKPOINT, refuse_other_layout)
    take(patches, seams.LOAD_CHECKPOINT, lambda original: refuse_batches_ahead(original, options))
    take(patches, seams.SKIP_STEP, draw_from_every_chunk)
    take(patches, seams.SAVE_LOADER, save_first_chunks_loader)
    if options.overlap:
        from counterflow.megatron.pipeline.overlap import defer_inside_plans

        check_seams("overlap")
        defer_inside_plans(patches)
    if is_v:
        take(patches, seams.MAKE_GROUPS, keep_embeddings_on_first_rank)
        take(patches, seams.SAVE_SHARDS, save_copies_once)
        take(patches, seams.LOAD_SHARDS, load_copies_apart)
        # Checkpoints on a node's own disk (--non-persistent-ckpt-type local) are read past the other.
        take(patches, seams.LOAD_CHECKPOINT, load_copies_apart)
        take(patches, seams.GET_MODEL, lambda original: _wrap_first(original, lay_out_as_v))
        take(patches, seams.BUILD_STAGES, lambda original: _wrap_first(original, lay_out_as_v))
        take(patches, seams.BUILD_ITERATORS, lambda original: _wrap_first(original, mirror_dataset_provider))
    if count_replicas(layout) > 1:
        take(patches, seams.BUILD_ITERATORS, read_partners_data)


def install_balancing(patches: Patches, options: Options) -> None:
    """Give MoE layers slots, and take the steps around which clones are filled; after the schedule, which it wraps."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from counterflow.megatron.checkpoint import refuse_other_experts
    from counterflow.megatron.experts.balancing import ExpertBalancer
    from counterflow.megatron.experts.layer import answer_from_shares, deal_to_slots, give_slots

    balancer = ExpertBalancer(options)
    is_exact = options.eplb_split == "exact"
    build = give_slots(MoELayer.__init__, options.eplb_clones_per_rank, is_exact=is_exact)
    patches.set(MoELayer, "__init__", build)
    patches.set(MoELayer, "preprocess", deal_to_slots(MoELayer.preprocess))
    # There alone: elsewhere the function of that name has other work.
    name = seams.GATHER_COUNTS.symbol
    patches.set(token_dispatcher, name, answer_from_shares(getattr(token_dispatcher, name)))
    take(patches, seams.GET_SCHEDULE, lambda original: _balance_schedule(original, balancer))
    take(patches, seams.TRAIN_STEP, balancer.wrap_train_step)
    take(patches, seams.SAVE_CHECKPOINT, balancer.wrap_save)
    take(patches, seams.LOAD_CHECKPOINT, refuse_other_experts)
    if seams.REPORT_MOE.is_present():
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


def _check_first(forward_backward: Callable[..., Any], check_model: Callable[[list[Any]], None]) -> Callable[..., Any]:
    is_checked = False

    @wraps(forward_backward)
    def run(**kwargs: Any) -> Any:
        nonlocal is_checked
        if not is_checked:
            check_model(kwargs["model"] if isinstance(kwargs["model"], list) else [kwargs["model"]])
            is_checked = True
        return forward_backward(**kwargs)

    return run


def _choose_schedule(original: Callable[..., Any], run: Callable[..., Any], options: Options) -> Callable[..., Any]:
    @wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import schedules

        if type(kwargs.get("schedule_pg_collection")).__name__ == "MultiModuleProcessGroupCollection":
            raise OptionError("--cf-schedule does not run models of several pipelines (multi-module process groups): drop it")
        chosen = original(*args, **kwargs)
        if chosen is not schedules.forward_backward_no_pipelining:
            return run
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            raise OptionError(
                f"--cf-schedule {options.schedule} needs at least 2 pipeline ranks and this run has 1: make process groups with "
                "pipeline_model_parallel_size 2 or more, or drop the schedule"
            )
        # Asked for a model without a pipeline beside the one that has one, upstream's choice stands.
        return chosen

    return get_forward_backward_func


def _refuse_own_schedules(options: Options) -> Callable[..., Any]:
    """Return what stands in the place of the transfers of Megatron's own pipelined schedules, which nobody may run now."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OptionError(
            f"Megatron's own pipeline schedule runs and --cf-schedule {options.schedule} is in force: call "
            "get_forward_backward_func() after counterflow.enable(), not before"
        )

    return refuse
