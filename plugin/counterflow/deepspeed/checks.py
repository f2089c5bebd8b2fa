"""Refuse what cannot work, before an engine is made."""

from collections.abc import Mapping
from typing import Any

from counterflow.deepspeed.section import Chosen
from counterflow.errors import OptionError

WAYS = "make one: PipelineModule(layers=[…], loss_fn=…, num_stages=P); each layer takes what the one before returns"


def check_run(chosen: Chosen, config: Any, model: Any) -> None:
    """Raise `OptionError` for a model or config that does not fit the options."""
    options = chosen.options
    if options.eplb:
        raise OptionError("eplb: this version balances no experts under DeepSpeed: drop it")
    if options.schedule is None:
        return
    from deepspeed.pipe import PipelineModule

    if not isinstance(model, PipelineModule):
        raise OptionError(f"schedule {options.schedule} needs a PipelineModule and the model is a {type(model).__name__}: {WAYS}")
    if model.num_pipeline_stages() < 2:
        raise OptionError(
            f"schedule {options.schedule} needs at least 2 pipeline ranks and num_stages is 1: give the PipelineModule "
            "num_stages 2 or more, or drop the schedule"
        )
    if isinstance(config, Mapping):
        check_config(chosen, config)


def check_config(chosen: Chosen, config: Mapping[str, Any]) -> None:
    """Raise `OptionError` for keys of a DeepSpeed config that a schedule does not work with."""
    schedule = chosen.options.schedule
    stage = _find(config, "zero_optimization", "stage") or 0
    if stage not in (0, 1):
        raise OptionError(
            f"zero_optimization.stage {stage} does not run in a pipeline, with schedule {schedule} or without (DeepSpeed refuses "
            "it too): give stage 0 or 1"
        )
    if _find(config, "compile", "deepcompile"):
        raise OptionError(
            f"compile.deepcompile compiles whole steps, which schedule {schedule} cuts into actions: drop one of them"
        )


def _find(config: Mapping[str, Any], section: str, key: str) -> Any:
    found = config.get(section)
    return found.get(key) if isinstance(found, Mapping) else None
