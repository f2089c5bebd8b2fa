"""The state of one parameter in Megatron's optimizers: fp32 master and moments, whole or this rank's shard of them."""

from typing import Any

import torch

from counterflow.errors import SeamError


def take_state(optimizer: Any, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """Return the master and the moments of a parameter, in the same order on all ranks; [] if this rank has no shard of it.

    Step counters, which are equal for all parameters, are left out, and so is a master that is the parameter itself. Raises
    `SeamError` if no optimizer has the parameter.
    """
    is_sharded = False
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(one, "model_param_group_index_map"):
            is_sharded = True
            if parameter in one.model_param_group_index_map:
                state = one._get_main_param_and_optimizer_states(parameter)
                return [state.pop("param"), *_drop_counters(state)]
            continue
        inner = one.optimizer
        master = getattr(parameter, "main_param", parameter)
        if inner is not None and any(master is own for group in inner.param_groups for own in group["params"]):
            moments = _drop_counters(inner.state.get(master, {}))
            return moments if master is parameter else [master, *moments]
    if is_sharded:
        return []
    raise SeamError(
        f"{type(optimizer).__name__} of this megatron-core does not know an expert's weight of shape {tuple(parameter.shape)}: "
        "drop --cf-eplb-rehome-interval"
    )


def _drop_counters(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for _, value in sorted(state.items()) if torch.is_tensor(value) and value.dim()]
