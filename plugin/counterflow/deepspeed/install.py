"""Put the options of a DeepSpeed JSON in force when a script calls ``deepspeed.initialize``."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from counterflow.deepspeed import seams
from counterflow.deepspeed.section import read_config
from counterflow.errors import CounterflowError, OptionError
from counterflow.options import Options, Values, require_in_force
from counterflow.patching import Patches
from counterflow.sections import Chosen, read_section, speak_json
from counterflow.trainer.pipeline import check_folders
from counterflow.trainer.seam import take_seams
from counterflow.trainer.tables import splits_backward


class Installation:
    """What is in force in this process; ``patches`` is the undo log.

    ``enabled`` has the options that were passed to ``enable()``, ``flags`` those of the command line.
    """

    def __init__(self, patches: Patches, enabled: Values, flags: Values) -> None:
        self.patches = patches
        # Those of the last engine that was made under a schedule or with balanced experts.
        self.options: Options | None = None
        self._given = enabled | flags
        self._features: set[str] = set()

    def take(self, *features: str) -> None:
        """Check the seams of features that are not in force yet, and install them."""
        due = [feature for feature in features if feature not in self._features]
        seams.check_seams(due)
        fresh = [seam for seam in seams.list_seams() if not self._features & set(seam.features)]
        take_seams(fresh, self.patches, due, "counterflow.deepspeed", self)
        self._features |= set(due)

    def require_same(self, asked: Values) -> None:
        """Raise `OptionError` if an option in ``asked`` has another value in force."""
        require_in_force(asked, self._given)

    def find_data_rank(self, chunk: int) -> int:
        """Raise `OptionError`: DeepSpeed deals samples itself."""
        raise OptionError("find_data_rank() is for loops over megatron.core; DeepSpeed's engine deals samples itself")

    def read_config(self, initialize: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``deepspeed.initialize``: the key in its config decides what the engine runs."""

        @wraps(initialize)
        def read_and_initialize(
            args: Any = None, model: Any = None, optimizer: Any = None, model_parameters: Any = None, **others: Any
        ) -> Any:
            named = {"args": args, "model": model, "optimizer": optimizer, "model_parameters": model_parameters}
            config = find_config(args, others)
            section = read_config(config) if config is not None else None
            if section is None and not self._given:
                return initialize(**named, **others)
            try:
                chosen = read_section(section, self._given)
                named = self._prepare(chosen, config, named)
                made = initialize(**named, **others)
                self._finish(chosen.options, made[0])
                return made
            except CounterflowError as error:
                raise speak_json(error) from None

        return read_and_initialize

    def _prepare(self, chosen: Chosen, config: Any, named: dict[str, Any]) -> dict[str, Any]:
        from counterflow.deepspeed.checks import check_run
        from counterflow.deepspeed.pipeline.module import convert
        from counterflow.devices import load_kernels_early

        options = chosen.options
        check_folders(options)
        check_run(chosen, config, named["model"])
        self.options = options
        if options.eplb:
            self.take(seams.EXPERTS)
        if options.schedule is None:
            return named
        load_kernels_early()
        due = {seams.ZERO_BUBBLE: splits_backward(options), seams.OVERLAP: options.overlap}
        self.take(seams.SCHEDULE, *(feature for feature, is_due in due.items() if is_due))
        return named | convert(named["model"], chosen, named["optimizer"], named["model_parameters"])

    def _finish(self, options: Options, engine: Any) -> None:
        """Prepare an engine that was made."""
        from counterflow.deepspeed.experts.balancing import attach
        from counterflow.deepspeed.stages import note_stages

        if (options.schedule is not None or options.eplb) and engine._config.expert_parallel_config.enabled:
            note_stages(engine)
        if options.eplb:
            attach(engine, options)

    def choose_engine(self, init: Callable[..., None]) -> Callable[..., None]:
        """Wrap how DeepSpeed's pipeline engine is made: for a model in chunks it becomes one that runs tables."""

        @wraps(init)
        def make(self: Any, *args: Any, model: Any = None, **kwargs: Any) -> None:
            from deepspeed.runtime.pipe.engine import PipelineEngine

            from counterflow.deepspeed.pipeline.engine import make_engine_class
            from counterflow.deepspeed.state import chunks_of

            base: Any = PipelineEngine
            if type(self) is PipelineEngine and model in chunks_of:
                self.__class__ = make_engine_class(base)
                type(self).__init__(self, *args, model=model, **kwargs)
            else:
                init(self, *args, model=model, **kwargs)

        return make


def find_config(args: Any, others: dict[str, Any]) -> Any:
    """Return the config that a call of ``deepspeed.initialize`` will use; None if it has none."""
    given = (others.get("config"), others.get("config_params"), getattr(args, "deepspeed_config", None))
    return next((one for one in given if one is not None), None)


def install(patches: Patches, enabled: Values, flags: Values) -> Installation:
    """Wrap ``deepspeed.initialize``, and what has to be noted of a model before."""
    installation = Installation(patches, enabled, flags)
    installation.take(seams.CONFIG)
    return installation
