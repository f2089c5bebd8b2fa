"""Put options in force: at once if all of them are known, else when Megatron has read its YAML file.

The seams of schedule and balancing are installed together with the options, so any loop over ``megatron.core`` runs under them.
Checks that need the run's sizes read the arguments of ``megatron.training`` when they are parsed. In another loop they read the
model's config in the first step (`counterflow.megatron.checks`).
"""

import sys
from collections.abc import Callable, Collection
from functools import wraps
from typing import TYPE_CHECKING, Any

from counterflow.errors import CounterflowError, OptionError
from counterflow.megatron import seams
from counterflow.megatron.loop import find_arguments
from counterflow.options import (
    Options,
    Values,
    add_flags,
    fail,
    merge_options,
    read_flags,
    read_values,
    require_in_force,
)
from counterflow.patching import Patches
from counterflow.schedule.layouts import V
from counterflow.trainer.pipeline import check_folders
from counterflow.trainer.seam import take_seams as take_all
from counterflow.trainer.tables import choose_layout, count_replicas, name_model_layout, splits_backward

if TYPE_CHECKING:
    from counterflow.megatron.experts.balancing import ExpertBalancer
    from counterflow.megatron.experts.layer import SlotWrappers

YAML_FLAG = "--yaml-cfg"


def list_features(options: Options) -> list[str]:
    """Return the names of the features that the options ask for, as `seams` has them."""
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
        features += [seams.REHOMING] if options.needs_moves else []
    return features


def take_seams(patches: Patches, features: Collection[str], run: Any = None) -> None:
    """Install the wrappers of the features' seams; ``run``, an `Installation`, has those that depend on its options."""
    take_all(seams.list_seams(), patches, features, "counterflow.megatron", run)


class Installation:
    """The options in force in this process, and what was installed for them; ``patches`` is the undo log.

    ``enabled`` has the options that were passed to ``enable()``, ``flags`` those of the command line.
    """

    def __init__(self, patches: Patches, enabled: Values, flags: Values) -> None:
        self.patches = patches
        # None while a YAML file may add to them.
        self.options: Options | None = None
        self._enabled, self._flags = enabled, flags
        # The options of the YAML file and the flags of the training that parsed its arguments last.
        self._parsed: tuple[Values, Values] | None = None
        self._is_reader_asked = False
        self._run_step: Callable[..., Any] | None = None
        self.balancer: ExpertBalancer | None = None
        self.slots: SlotWrappers | None = None

    def put_in_force(self, options: Options) -> None:
        """Check the seams of the features that the options ask for, and install them. Raises `SeamError` if one does not fit."""
        check_folders(options)
        features = list_features(options)
        seams.check_seams(features)
        if seams.V_LAYOUT in features:
            _require_early(options)
        self.options = options
        if options.schedule is not None:
            from counterflow.devices import load_kernels_early
            from counterflow.megatron.pipeline.schedule import PipelineSchedule

            load_kernels_early()
            self._run_step = self._check_first(PipelineSchedule(options).forward_backward)
        if options.eplb:
            from counterflow.megatron.experts.balancing import ExpertBalancer
            from counterflow.megatron.experts.layer import SlotWrappers

            self.balancer = ExpertBalancer(options)
            self.slots = SlotWrappers(options.layer_clones, is_exact=options.eplb_split == "exact", shared=options.shared_clones)
        take_seams(self.patches, features, self)
        self.patches.on_undo(self._forget)

    def _forget(self) -> None:
        # All of them refer to the model, which has to be freed.
        self._run_step = self.balancer = self.slots = None

    def choose_schedule(self, get_forward_backward_func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's choice of a schedule: the table's replaces a pipelined one, and clones are filled before it runs."""

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
        # A second model without a pipeline, beside the pipelined one, keeps upstream's choice.
        return chosen

    def refuse_own_transfers(self, _: Any) -> Callable[..., Any]:
        """Return a function that raises, in place of the transfers of Megatron's own pipelined schedules."""
        assert self.options is not None
        schedule = self.options.schedule

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise OptionError(
                f"Megatron's own pipeline schedule runs and --cf-schedule {schedule} is in force: call "
                "get_forward_backward_func() after counterflow.enable(), not before"
            )

        return refuse

    def guard_checkpoint(self, load_base_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap upstream's first look into a checkpoint: a checkpoint that does not fit this run is refused there."""
        from counterflow.megatron.checkpoint import guard_checkpoint

        assert self.options is not None
        return guard_checkpoint(load_base_checkpoint, self.options)

    def read_data(self, build_iterators: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the builder of data iterators: the second chunk of a V reads the data of the mirrored pipeline rank.

        Across replicas, it reads the data of the partner.
        """
        from counterflow.megatron.pipeline.crosslink import read_partners_data
        from counterflow.megatron.v_layout.model import mirror_dataset_provider, wrap_first

        build: Callable[..., Any] = wrap_first(build_iterators, mirror_dataset_provider)
        # The outer wrapper: it has to see for which chunk the provider is.
        return read_partners_data(build) if self._is_linked() else build

    def prepare_after(self, parse_args: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the parsing of arguments: after it, options are put in force and checked."""

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
        """Return the data-parallel rank whose samples a chunk reads: this one; for chunk 1 across replicas, the partner."""
        from counterflow.megatron.pipeline.crosslink import find_partner
        from counterflow.megatron.v_layout.model import WAY_BACK

        self._is_reader_asked = True
        return find_partner() if self._is_linked() and chunk == WAY_BACK else get_data_rank()

    def _is_linked(self) -> bool:
        if self.options is None or self.options.schedule is None:
            return False
        return count_replicas(choose_layout(self.options, 2, 2)) > 1

    def _check_model(self, chunks: list[Any]) -> None:
        """Refuse, before the first step, a model that was not built for the schedule."""
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

    def require_same(self, asked: Values) -> None:
        """Raise `OptionError` if an option in ``asked`` has another value in force."""
        current = self.options or Options.model_construct(**(self._enabled | self._flags))
        require_in_force(asked, current.model_dump())

    def take_arguments(self, parsed: Any) -> None:
        """Check the arguments of ``megatron.training``, and write the options in force into them."""
        from counterflow.megatron.checks import prepare_arguments

        yaml, flags = read_yaml(parsed), read_flags(sys.argv[1:])
        if self._parsed is None:
            merged = merge_options(yaml, self._enabled, self._flags | flags)
            if self.options is None:
                self.put_in_force(merged)
            self.require_same(merged.model_dump())
            self._delay_engine(parsed)
        elif self._parsed != (yaml, flags):
            # A second training in this process: the options that its own flags do not set count with their defaults.
            self.require_same(merge_options(yaml, self._enabled, flags).model_dump())
        self._parsed = yaml, flags
        assert self.options is not None
        prepare_arguments(parsed, self.options)
        # Megatron saves its arguments in each checkpoint, so the next load knows under which options it was saved.
        for name, value in self.options.model_dump(mode="json").items():
            setattr(parsed, f"cf_{name}", value)

    def _delay_engine(self, parsed: Any) -> None:
        from counterflow.megatron.pipeline.zero_bubble import find_engine_obstacle

        assert self.options is not None
        is_engine = getattr(parsed, "transformer_impl", "") == "transformer_engine"
        if splits_backward(self.options) and is_engine and find_engine_obstacle(parsed) is None:
            seams.check_seams([seams.ENGINE])
            take_seams(self.patches, [seams.ENGINE])


def install(patches: Patches, enabled: Values, flags: Values) -> Installation:
    """Install the plugin: its flags in the script's ``--help``, and the features once all options are known."""
    seams.check_seams([seams.FLAGS])
    installation = Installation(patches, enabled, flags)
    take_seams(patches, [seams.FLAGS], installation)
    if not any(argument.split("=", 1)[0] == YAML_FLAG for argument in sys.argv[1:]):
        installation.put_in_force(merge_options(enabled, flags))
    return installation


def _require_early(options: Options) -> None:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        raise OptionError(
            f"--cf-schedule {options.schedule} makes process groups of its own for copies of the embedding and Megatron's are "
            "made already: call counterflow.enable() before initialize_model_parallel()"
        )


def show_flags(add_arguments: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap Megatron's declaration of its flags: the plugin's flags follow them."""

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


def read_yaml(parsed: Any) -> Values:
    """Return the options in the ``counterflow:`` section of a ``--yaml-cfg`` file."""
    section = getattr(parsed, "counterflow", None)
    if section is None:
        return {}
    values = read_values(vars(section) if hasattr(section, "__dict__") else section)
    if (platform := values.get("platform", "auto")) != "auto":
        raise OptionError(
            f"platform: {platform} stands in the YAML file, which is read after the platform is chosen: "
            f"give --cf-platform {platform} on the command line"
        )
    return values


def get_data_rank() -> int:
    """Return this rank's place among the data-parallel replicas."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())
