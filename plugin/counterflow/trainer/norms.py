"""The norm of all gradients of a model that ranks hold in parts."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from counterflow.devices import find_device


@torch.no_grad()
def clip_by_norm(
    gradients: Sequence[torch.Tensor],
    counted: Iterable[tuple[list[torch.Tensor], dist.ProcessGroup | None]],
    group: dist.ProcessGroup,
    most: float,
) -> float:
    """Scale ``gradients`` such that the norm of what all ranks of ``group`` count is at most ``most``; return the norm.

    ``counted`` has this rank's gradients that count, with the group of ranks that hold other parts of the same, if any: all ranks
    of the group count them.
    """
    total = torch.zeros((), device=find_device())
    for some, holders in counted:
        square = torch.stack([one.float().square().sum() for one in some]).sum()
        if holders is not None:
            dist.all_reduce(square, group=holders)
        total += square
    dist.all_reduce(total, group=group)
    norm = float(total.sqrt())
    if norm > most:
        torch._foreach_mul_(list(gradients), most / (norm + 1e-6))
    return norm


def sum_norms(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the norm of what the ranks of ``group`` have, from each rank's own norm; a norm that is not finite is -1."""
    total = torch.where(own < 0, torch.inf, own).square()
    dist.all_reduce(total, group=group)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)
