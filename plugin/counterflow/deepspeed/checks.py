"""Refuse what cannot work, before an engine is made."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from counterflow.deepspeed.section import KEY, Chosen, load_config, read_config, read_section
from counterflow.errors import OptionError
from counterflow.options import Options
from counterflow.trainer.crosslink import require_pairs
from counterflow.trainer.tables import choose_layout, count_replicas, name_model_layout

WAYS = "make one: PipelineModule(layers=[…], loss_fn=…, num_stages=P); each layer takes what the one before returns"


def check_run(chosen: Chosen, config: Any, model: Any) -> None:
    """Raise `OptionError` for a model or config that does not fit the options."""
    options = chosen.options
    check_options(chosen)
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
    if count_replicas(choose_layout(options, 2, 2)) > 1:
        replicas = model._grid.get_data_parallel_world_size()
        require_pairs(options.schedule, replicas, dist.get_world_size() // replicas)
    if config is not None:
        check_config(chosen, load_config(config))


def check_options(chosen: Chosen) -> None:
    """Raise `OptionError` for options that this version does not run under DeepSpeed."""
    options = chosen.options
    if options.eplb:
        raise OptionError("eplb: this version balances no experts under DeepSpeed: drop it")
    if options.overlap:
        raise OptionError("overlap: this version overlaps no pairs under DeepSpeed: drop it")


def check_config(chosen: Chosen, config: Mapping[str, Any]) -> None:
    """Raise `OptionError` for keys of a DeepSpeed config that a schedule does not work with."""
    schedule = chosen.options.schedule
    stage = _find(config, "zero_optimization", "stage") or 0
    if stage not in (0, 1):
        raise OptionError(
            f"zero_optimization.stage {stage} does not run in a pipeline, with schedule {schedule} or without (DeepSpeed refuses "
            "it too): gradients stay whole until a rank's last micro-batch, so it would save nothing over 1: give stage 0 or 1"
        )
    if _find(config, "compile", "deepcompile"):
        raise OptionError(
            f"compile.deepcompile compiles whole steps, which schedule {schedule} cuts into actions: drop one of them"
        )


def explain(path: str) -> list[str]:
    """Return what the key of a DeepSpeed JSON asks for, a line for each part; raises `OptionError` for what is refused."""
    section = read_config(path)
    if section is None:
        return [f'{path} has no key "{KEY}": DeepSpeed runs as without the plugin']
    chosen = read_section(section)
    options = chosen.options
    check_options(chosen)
    lines = [
        f"{path}: {', '.join(f'{name} {value}' for name, value in options.model_dump(exclude_unset=True).items()) or 'nothing'}"
    ]
    if options.schedule is not None:
        check_config(chosen, load_config(path))
        layout = choose_layout(options, 2, chosen.vpp or 2)
        lines.append(f"a PipelineModule is cut into {layout.chunks} stages a rank, laid out {name_model_layout(layout)}")
        lines.append(f"weight gradients of linears {'wait for their W' if splits_backward(options) else 'are computed in the B'}")
    return lines


def splits_backward(options: Options) -> bool:
    """Tell whether linears leave weight gradients to a W."""
    return options.zero_bubble is not False and (options.family is None or options.family.splits)


def _find(config: Mapping[str, Any], section: str, key: str) -> Any:
    found = config.get(section)
    return found.get(key) if isinstance(found, Mapping) else None
