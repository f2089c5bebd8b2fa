"""What Megatron's optimizers keep for one parameter: the fp32 master, the moments; whole, or this rank's shard of them."""

from typing import Any

import torch

from counterflow.errors import SeamError


def take_state(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the master (``param``) and the optimizer's tensors of a parameter; none where this rank has no shard of it.

    A number of steps, the same for all, is left out.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(one, "model_param_group_index_map"):
            if parameter in one.model_param_group_index_map:
                return _drop_counters(one._get_main_param_and_optimizer_states(parameter))
            continue
        inner = getattr(one, "optimizer", None)
        master = getattr(parameter, "main_param", parameter)
        if inner is not None and any(master is own for group in inner.param_groups for own in group["params"]):
            return _drop_counters({"param": master, **inner.state.get(master, {})})
    if _is_sharded(optimizer):
        return {}
    raise SeamError(
        f"{type(optimizer).__name__} of this megatron-core does not say what it keeps for a parameter: drop --cf-eplb-rehome-interval"
    )


def put_state(optimizer: Any, parameter: torch.nn.Parameter, arrived: dict[str, torch.Tensor]) -> None:
    """Put what `take_state` returned elsewhere into this parameter's place."""
    for name, tensor in take_state(optimizer, parameter).items():
        tensor.detach().copy_(arrived[name])


def _drop_counters(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    shape = state["param"].shape
    return {name: value for name, value in sorted(state.items()) if torch.is_tensor(value) and value.shape == shape}


def _is_sharded(optimizer: Any) -> bool:
    return any(hasattr(one, "model_param_group_index_map") for one in getattr(optimizer, "chained_optimizers", [optimizer]))
