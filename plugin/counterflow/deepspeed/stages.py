"""Pipelines in which some stages have MoE layers and others have none.

AutoEP refuses a stage without MoE layers. And ZeRO sums the norm of each group of parameters over the stages. Experts are a group
of their own, so such a stage makes fewer sums than the others, and they wait for it for ever. Here each stage adds up its groups,
and the stages sum once.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from counterflow.deepspeed.state import uneven_optimizers
from counterflow.errors import OptionError
from counterflow.trainer.norms import sum_norms

# The optimizers whose stages sum once, now.
_summing: set[int] = set()


def list_layers(engine: Any) -> list[tuple[str, Any]]:
    """Return the layers of an engine's model that AutoEP has made, with their names."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return [(name, one) for name, one in engine.module.named_modules() if isinstance(one, AutoEPMoELayer)]


def note_stages(engine: Any) -> None:
    """Note whether some stages of an engine's pipeline have MoE layers and others none (a collective call).

    Raises `OptionError` if none has, or if the optimizer would wait for ever.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    has_layers = bool(list_layers(engine))
    ends = torch.tensor([has_layers, not has_layers], dtype=torch.int32, device=engine.device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    is_anywhere, is_missing = map(bool, ends.tolist())
    if not is_anywhere:
        raise OptionError(
            "AutoEP finds no MoE layer in this model: set expert_parallel.moe_layer_pattern, or drop expert_parallel"
        )
    if is_missing and isinstance(engine.optimizer, BF16_Optimizer):
        raise OptionError(
            "bf16 without ZeRO waits for ever in a pipeline where some stages have MoE layers and others none: give "
            "zero_optimization.stage 1"
        )
    if is_missing:
        uneven_optimizers.add(engine.optimizer)


def let_stages_be_dense(refuse: Callable[..., None]) -> Callable[..., None]:
    """Wrap how AutoEP refuses a model without MoE layers: a stage of a pipeline may be one."""

    @wraps(refuse)
    def refuse_others(self: Any, presets_to_try: Any) -> None:
        if not hasattr(self.model, "num_pipeline_stages") or self.model.num_pipeline_stages() == 1:
            refuse(self, presets_to_try)

    return refuse_others


def count_stages_alike(scaled_global_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the norm of all gradients, which is -1 where it is not finite."""

    @wraps(scaled_global_norm)
    def norm(self: Any, norm_type: int = 2) -> Any:
        if self not in uneven_optimizers:
            return scaled_global_norm(self, norm_type)
        _summing.add(id(self))
        try:
            own = torch.as_tensor(scaled_global_norm(self, norm_type), dtype=torch.float32, device=self.device)
        finally:
            _summing.remove(id(self))
        return sum_norms(own, self.model_parallel_group)

    return norm


def leave_to_one_sum(all_reduce: Callable[..., None]) -> Callable[..., None]:
    """Wrap the sum over the stages: inside the norm of all gradients it does nothing."""

    @wraps(all_reduce)
    def reduce(self: Any, tensor: torch.Tensor, op: Any) -> None:
        if id(self) not in _summing:
            all_reduce(self, tensor, op)

    return reduce
