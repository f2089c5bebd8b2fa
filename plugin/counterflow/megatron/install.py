"""Put options in force: at once where all of them are known, else when Megatron has read its YAML file.

The seams of schedule and balancing go in with the options, so any loop over ``megatron.core`` runs under them. What needs to
know the run is checked on the arguments of ``megatron.training`` when they are parsed, or, in another loop, on the model's
config in the first step (`counterflow.megatron.checks`).
"""

import importlib
import sys
from collections.abc import Callable, Collection
from functools import wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from counterflow.errors import CounterflowError, OptionError
from counterflow.megatron import seams
from counterflow.megatron.loop import find_arguments
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
from counterflow.trainer.seam import Wrapper
from counterflow.trainer.tables import choose_layout, count_replicas, name_model_layout

if TYPE_CHECKING:
    from counterflow.megatron.experts.balancing import ExpertBalancer
    from counterflow.megatron.experts.layer import SlotWrappers

YAML_FLAG = "--yaml-cfg"


def list_features(options: Options) -> list[str]:
    """Return the features that the options ask for, by the names that the seams have for them."""
    features = []
    if options.schedule is not None:
        layout = choose_layout(options, 2, 2)
        features += [seams.SCHEDULE]
        features += [seams.V_LAYOUT] if name_model_layout(layout) == V else []
        features += [seams.CROSSLINK] if count_replicas(layout) > 1 else []
        features += [seams.ZERO_BUBBLE] if splits_backward(options) else []
        features += [seams.OVERLAP] if options.overlap else []
    if options.eplb:
        features += [seams.EPLB]
        features += [seams.REHOMING] if options.eplb_rehome_interval is not None else []
    return features


def take_seams(patches: Patches, features: Collection[str], run: "Installation | None" = None) -> None:
    """Replace what the features replace in Megatron; ``run`` has the wrappers that need to know its options."""
    for seam in seams.list_seams():
        if seam.wrap is not None and set(features) & set(seam.features):
            seam.take(patches, find_wrapper(seam.wrap, run))


def find_wrapper(name: str, run: "Installation | None") -> Wrapper:
    """Return the wrapper that a seam names: with a dot before it one of the run, else one of this package."""
    home, _, function = name.rpartition(".")
    wrapper: Wrapper = (
        attrgetter(name[1:])(run)
        if name.startswith(".")
        else getattr(importlib.import_module(f"counterflow.megatron.{home}"), function)
    )
    return wrapper


class Installation:
    """The options in force in this process and what was installed for them; ``patches`` takes it all back."""

    def __init__(self, patches: Patches, given: Given, flags: Given) -> None:
        self.patches = patches
        # None while a YAML file may add to them.
        self.options: Options | None = None
        self._given, self._flags = given, flags
        self._parsed: tuple[Given, Given] | None = None
        self._is_reader_asked = False
        self._run_step: Callable[..., Any] | None = None
        self.balancer: ExpertBalancer | None = None
        self.slots: SlotWrappers | None = None

    def put_in_force(self, options: Options) -> None:
        """Check the seams of what the options ask for, and take them. Raises `SeamError` where one does not fit."""
        if options.record is not None:
            check_folder("--cf-record", options.record)
        features = list_features(options)
        seams.check_seams(features)
        if seams.V_LAYOUT in features:
            _require_early(options)
        self.options = options
        if options.schedule is not None:
            from counterflow.megatron.pipeline.schedule import PipelineSchedule

            self._run_step = self._check_first(PipelineSchedule(options).forward_backward)
        if options.eplb:
            from counterflow.megatron.experts.balancing import ExpertBalancer
            from counterflow.megatron.experts.layer import SlotWrappers

            self.balancer = ExpertBalancer(options)
            self.slots = SlotWrappers(options.eplb_clones_per_rank, is_exact=options.eplb_split == "exact")
        take_seams(self.patches, features, self)
        self.patches.on_undo(self._forget)

    def _forget(self) -> None:
        # What it holds leads to the model.
        self._run_step = self.balancer = self.slots = None

    def choose_schedule(self, get_forward_backward_func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's choice of a schedule: the table's takes the place of a pipelined one, clones are filled around it."""

        @wraps(get_forward_backward_func)
        def choose(*args: Any, **kwargs: Any) -> Any:
            is_multiple = type(kwargs.get("schedule_pg_collection")).__name__ == "MultiModuleProcessGroupCollection"
            if self._run_step is not None and is_multiple:
                raise OptionError("--cf-schedule does not run models of several pipelines (multi-module process groups): drop it")
            chosen = get_forward_backward_func(*args, **kwargs)
            if self._run_step is not None:
                chosen = self._replace_pipelined(chosen)
            return self.balancer.wrap_schedule(chosen) if self.balancer is not None else chosen

        return choose

    def _replace_pipelined(self, chosen: Callable[..., Any]) -> Callable[..., Any]:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import schedules

        assert self._run_step is not None and self.options is not None
        is_pipelined: bool = chosen is not schedules.forward_backward_no_pipelining
        if is_pipelined:
            return self._run_step
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            raise OptionError(
                f"--cf-schedule {self.options.schedule} needs at least 2 pipeline ranks and this run has 1: make process groups "
                "with pipeline_model_parallel_size 2 or more, or drop the schedule"
            )
        # Asked for a model without a pipeline beside the one that has one, upstream's choice stands.
        return chosen

    def refuse_own_transfers(self, _: Any) -> Callable[..., Any]:
        """Return what stands in the place of the transfers of Megatron's own pipelined schedules, which nobody may run now."""
        assert self.options is not None
        schedule = self.options.schedule

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise OptionError(
                f"Megatron's own pipeline schedule runs and --cf-schedule {schedule} is in force: call "
                "get_forward_backward_func() after counterflow.enable(), not before"
            )

        return refuse

    def guard_checkpoint(self, load_base_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap upstream's first look into a checkpoint: what does not fit this run is refused there."""
        from counterflow.megatron.checkpoint import guard_checkpoint

        assert self.options is not None
        return guard_checkpoint(load_base_checkpoint, self.options)

    def read_data(self, build_iterators: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the builder of data iterators: a V's second chunk reads as the mirrored rank, across replicas as the partner."""
        from counterflow.megatron.pipeline.crosslink import read_partners_data
        from counterflow.megatron.v_layout.model import mirror_dataset_provider, wrap_first

        build: Callable[..., Any] = wrap_first(build_iterators, mirror_dataset_provider)
        # Around the other: it has to see which chunk the provider is for.
        return read_partners_data(build) if self._is_linked() else build

    def prepare_after(self, parse_args: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the parsing of arguments: options are put in force and checked behind it."""

        @wraps(parse_args)
        def parse_and_prepare(*args: Any, **kwargs: Any) -> Any:
            parsed = parse_args(*args, **kwargs)
            try:
                self.take_arguments(parsed)
            except CounterflowError as error:
                fail(error, parsed.rank)
            return parsed

        return parse_and_prepare

    def _check_first(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        is_checked = False

        @wraps(forward_backward)
        def run(**kwargs: Any) -> Any:
            nonlocal is_checked
            if not is_checked:
                self._check_model(kwargs["model"] if isinstance(kwargs["model"], list) else [kwargs["model"]])
                is_checked = True
            return forward_backward(**kwargs)

        return run

    def find_data_rank(self, chunk: int) -> int:
        """Return the data-parallel rank whose samples a chunk reads: this one, or on the way back across replicas the partner."""
        from counterflow.megatron.pipeline.crosslink import find_partner
        from counterflow.megatron.v_layout.model import WAY_BACK

        self._is_reader_asked = True
        return find_partner() if self._is_linked() and chunk == WAY_BACK else get_data_rank()

    def _is_linked(self) -> bool:
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
        from counterflow.megatron.pipeline.zero_bubble import find_engine_obstacle

        assert self.options is not None
        is_engine = getattr(parsed, "transformer_impl", "") == "transformer_engine"
        if splits_backward(self.options) and is_engine and find_engine_obstacle(parsed) is None:
            seams.check_seams([seams.ENGINE])
            take_seams(self.patches, [seams.ENGINE])


def install(patches: Patches, given: Given, flags: Given) -> Installation:
    """Install the plugin: its flags in the script's ``--help``, and all that the options ask for as soon as all are known."""
    seams.check_seams([seams.FLAGS])
    installation = Installation(patches, given, flags)
    take_seams(patches, [seams.FLAGS], installation)
    if not any(argument.split("=", 1)[0] == YAML_FLAG for argument in sys.argv[1:]):
        installation.put_in_force(merge_options(given, flags))
    return installation


def _require_early(options: Options) -> None:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        raise OptionError(
            f"--cf-schedule {options.schedule} makes process groups of its own for copies of the embedding and Megatron's are "
            "made already: call counterflow.enable() before initialize_model_parallel()"
        )


def show_flags(add_arguments: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap Megatron's declaration of its flags: the plugin's stand behind them."""

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
