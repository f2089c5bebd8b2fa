"""The state of one expert's weights in DeepSpeed's optimizers: fp32 master and moments, whole or this rank's shard of them."""

from typing import Any

import torch

from counterflow.moe.gradients import Part
from counterflow.trainer.optimizer_state import list_moments, refuse_unknown


def take_state(optimizer: Any, part: Part) -> list[torch.Tensor]:
    """Return the master and the moments of an expert's weight, in the same order on all ranks; [] if this rank has none of it.

    A master that is the parameter itself is left out. Raises `SeamError` if the optimizer does not know the weight.
    """
    if hasattr(part.whole, "_hp_mapping"):
        return _take_shard(optimizer, part)
    states = getattr(optimizer, "state", {})
    if any(part.whole is own for group in optimizer.param_groups for own in group["params"]):
        return [moment[part.index] for moment in list_moments(states.get(part.whole, {}), part.whole)]
    raise refuse_unknown(optimizer, part.whole.shape)


def _take_shard(optimizer: Any, part: Part) -> list[torch.Tensor]:
    """Return what lies in this rank's part of the flat tensors in which optimizers of DeepSpeed keep a group's weights."""
    mapping = part.whole._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return []
    held, size = mapping.lp_fragment_address, part.whole[0].numel()
    start, stop = (min(max(one, held.start), held.start + held.numel) for one in (part.index * size, (part.index + 1) * size))
    name = "single_partition_of_fp32_groups" if hasattr(optimizer, "single_partition_of_fp32_groups") else None
    flat = getattr(optimizer, name or "fp32_groups_flat_partition")[mapping.param_group_index]
    found = [flat.data, *list_moments(optimizer.optimizer.state.get(flat, {}), flat)]
    offset = mapping.hp_fragment_address.start + start - held.start
    return [one.narrow(0, offset, stop - start) for one in found] if stop > start else []
