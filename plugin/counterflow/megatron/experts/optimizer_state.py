"""The state of one parameter in Megatron's optimizers: fp32 master and moments, whole or this rank's shard of them."""

from typing import Any

import torch

from counterflow.trainer.optimizer_state import list_moments, refuse_unknown


def take_state(optimizer: Any, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """Return the master and the moments of a parameter, in the same order on all ranks; [] if this rank has no shard of it.

    A master that is the parameter itself is left out. Raises `SeamError` if no optimizer has the parameter.
    """
    is_sharded = False
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(one, "model_param_group_index_map"):
            is_sharded = True
            if parameter in one.model_param_group_index_map:
                state = one._get_main_param_and_optimizer_states(parameter)
                shard = state.pop("param")
                return [shard, *list_moments(state, shard)]
            continue
        inner = one.optimizer
        master = getattr(parameter, "main_param", parameter)
        if inner is not None and any(master is own for group in inner.param_groups for own in group["params"]):
            moments = list_moments(inner.state.get(master, {}), master)
            return moments if master is parameter else [master, *moments]
    if is_sharded:
        return []
    raise refuse_unknown(optimizer, parameter.shape)
