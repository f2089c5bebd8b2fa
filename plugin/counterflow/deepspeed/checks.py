"""Refuse what cannot work, before an engine is made."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from counterflow.deepspeed.section import load_config, read_config
from counterflow.errors import OptionError, refuse_first
from counterflow.options import Options
from counterflow.sections import KEY, Chosen, read_section
from counterflow.trainer.crosslink import require_pairs
from counterflow.trainer.tables import choose_layout, count_replicas, describe_run

WAYS = (
    "make one: PipelineModule(layers=[…], loss_fn=…, num_stages=P); each layer takes what the one before returns; "
    "without a schedule, eplb balances the experts of any model"
)


def check_run(chosen: Chosen, config: Any, model: Any) -> None:
    """Raise `OptionError` for a model or config that does not fit the options."""
    options = chosen.options
    if options.eplb:
        check_experts(model)
        check_balancing(options, load_config(config) if config is not None else {})
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


def check_config(chosen: Chosen, config: Mapping[str, Any]) -> None:
    """Raise `OptionError` for keys of a DeepSpeed config that a schedule does not work with."""
    schedule = chosen.options.schedule
    stage = _find(config, "zero_optimization", "stage") or 0
    whole = f"does not run in a pipeline, with schedule {schedule} or without (DeepSpeed refuses it too): gradients stay whole"
    cut = f"compiles whole steps, which schedule {schedule} cuts into actions: drop one of them"
    refuse_first({
        f"zero_optimization.stage {stage} {whole} until a rank's last micro-batch, so it would save nothing over 1: give stage 0 "
        "or 1": stage not in (0, 1),
        f"compile.deepcompile {cut}": bool(_find(config, "compile", "deepcompile")),
        "flops_profiler counts the steps of engines without pipeline (in one, DeepSpeed ends with an assertion): drop it": (
            bool(_find(config, "flops_profiler", "enabled"))
        ),
    })  # fmt: skip


def check_balancing(options: Options, config: Mapping[str, Any]) -> None:
    """Raise `OptionError` for keys of a DeepSpeed config that balanced experts do not work with."""
    if not _find(config, "expert_parallel", "enabled"):
        raise OptionError(
            "eplb balances the experts of layers that AutoEP replaces, and expert_parallel is not enabled: give "
            '"expert_parallel": {"enabled": true, "autoep_size": N, …}, or drop eplb'
        )
    stage = _find(config, "zero_optimization", "stage") or 0
    reasons = {
        f"zero_optimization.stage {stage} keeps no whole expert on a rank: give stage 0, 1 or 2": stage not in (0, 1, 2),
        "expert_parallel.comm_backend deepep sends tokens to experts, not to slots: give comm": (
            _find(config, "expert_parallel", "comm_backend") == "deepep"
        ),
        "tensor_parallel.autotp_size above 1 splits an expert's tokens over tensor-parallel ranks: drop it": (
            int(_find(config, "tensor_parallel", "autotp_size") or 1) > 1
        ),
        f"eplb.plan {options.eplb_plan} with eplb.buffers {options.eplb_buffers} adds gradients at homes in every micro-batch, "
        "and zero_optimization.stage 2 reduces them there: give stage 0 or 1": options.shared_clones > 0 and stage == 2,
        f"eplb.plan {options.eplb_plan} with eplb.buffers {options.eplb_buffers} runs in fp32 and bf16 in this version, and fp16 "
        "is enabled: give plan predicted and buffers per-layer": options.shared_clones > 0
        and bool(_find(config, "fp16", "enabled")),
        "eplb.measure_forced measures under Megatron alone in this version: drop it": options.eplb_measure_forced > 0,
        "compile.deepcompile compiles whole steps: drop it": bool(_find(config, "compile", "deepcompile")),
        "zero_optimization.zenflow delays gradients: drop it": bool(_find(config, "zero_optimization", "zenflow")),
        "managed_gradient_accumulation false reduces gradients before a step is known to end: drop it": (
            config.get("managed_gradient_accumulation", True) is False
        ),
    }
    refuse_first({f"eplb: {reason}": holds for reason, holds in reasons.items()})
    if options.needs_moves and (obstacle := find_homes_obstacle(config)) is not None:
        raise OptionError(f"eplb: eplb.rehome_interval {obstacle}: drop one of the two")


def find_homes_obstacle(config: Mapping[str, Any]) -> str | None:
    """Return why homes cannot move under a DeepSpeed config, as the end of a sentence about moves; None if they can."""
    if _find(config, "zero_optimization", "offload_optimizer"):
        return "moves optimizer states, and zero_optimization.offload_optimizer keeps them elsewhere"
    return None


def check_experts(model: Any) -> None:
    """Raise `OptionError` for a model whose MoE layers balance cannot help."""
    from deepspeed.moe.layer import MoE

    if any(isinstance(one, MoE) for one in model.modules()):
        raise OptionError(
            "eplb: the model has layers of deepspeed.moe.layer.MoE, which pad every expert to the same capacity and drop tokens "
            "beyond it: all ranks compute as much whatever the router does, and balance cannot help; take AutoEP "
            "(expert_parallel), which pads and drops nothing"
        )


def explain(path: str) -> list[str]:
    """Return what the key of a DeepSpeed JSON asks for, a line for each part; raises `OptionError` for what is refused."""
    section = read_config(path)
    if section is None:
        return [f'{path} has no key "{KEY}": DeepSpeed runs as without the plugin']
    chosen = read_section(section)
    options = chosen.options
    if options.eplb:
        check_balancing(options, load_config(path))
    if options.schedule is not None:
        check_config(chosen, load_config(path))
    given, *lines = describe_run(options, chosen.vpp or 2, "PipelineModule", "AutoEP's layers")
    lines.insert(0, f"{path}: {given}")
    if options.overlap and not _find(load_config(path), "expert_parallel", "enabled"):
        lines.append("overlap: no expert_parallel is enabled, so pairs hide only communications that the model itself marks")
    return lines


def _find(config: Mapping[str, Any], section: str, key: str) -> Any:
    found = config.get(section)
    return found.get(key) if isinstance(found, Mapping) else None
