"""Norms of pipelines in which some stages have MoE layers and others have none.

ZeRO sums the norm of each group of parameters over the stages. Experts are a group of their own, so a stage without MoE layers
makes fewer sums than the others, and they wait for it for ever. Here each stage adds up its groups, and the stages sum once.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from counterflow.deepspeed.state import uneven_optimizers
from counterflow.errors import OptionError

# The optimizers whose stages sum once, now.
_summing: set[int] = set()


def note_stages(engine: Any) -> None:
    """Note whether the stages of a pipeline's engine have as many groups of parameters (a collective call)."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    count = len(engine.optimizer.param_groups)
    ends = torch.tensor([count, -count], device=engine.device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=engine.mpu.get_pipe_parallel_group())
    if int(ends.sum()) == 0:
        return
    if isinstance(engine.optimizer, BF16_Optimizer):
        raise OptionError(
            "bf16 without ZeRO waits for ever in a pipeline where some stages have MoE layers and others none: give "
            "zero_optimization.stage 1"
        )
    uneven_optimizers.add(engine.optimizer)


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
        total = torch.where(own < 0, torch.inf, own).square()
        dist.all_reduce(total, group=self.model_parallel_group)
        return torch.where(total.isfinite(), total.sqrt(), -1.0)

    return norm


def leave_to_one_sum(all_reduce: Callable[..., None]) -> Callable[..., None]:
    """Wrap the sum over the stages: inside the norm of all gradients it does nothing."""

    @wraps(all_reduce)
    def reduce(self: Any, tensor: torch.Tensor, op: Any) -> None:
        if id(self) not in _summing:
            all_reduce(self, tensor, op)

    return reduce
