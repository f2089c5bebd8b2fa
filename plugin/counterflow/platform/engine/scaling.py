"""Scales: those of delayed scaling from histories of largest magnitudes, and those of FP8 weights whose masters are sharded."""

import torch

from counterflow.platform.engine.casts import LARGEST, cast, find_scale
from counterflow.platform.engine.names import find_type

Tensor = torch.Tensor


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Put the largest magnitude of ``tensor`` into ``amax``."""
    amax.copy_(tensor.abs().amax().float().reshape(amax.shape))


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: object, margin: float
) -> None:
    """Note the step's largest magnitudes, reduced over ranks, in each history, derive its scales, and begin a new row.

    ``reduced`` has the magnitudes of all modules one after another, in the order of ``histories``, ``[length, tensors]``.
    """
    top, start = torch.finfo(find_type(dtype)).max, 0
    for history, scale in zip(histories, scales, strict=True):
        own = reduced[start : start + history.shape[1]]
        start += history.shape[1]
        history[0].copy_(torch.where(own != 0, own, history[0]))
        amax = history[0].clone() if algorithm == "most_recent" else history.amax(0)
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()
        new = top / amax / 2.0**margin
        new = torch.where(torch.isinf(new), torch.full_like(new, LARGEST), new)
        scale.copy_(torch.where((amax > 0) & torch.isfinite(amax), new, scale))


def _find_blocks(count: int, width: int, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Return row and column of the block of each of ``count`` values of a matrix that begin at ``start``."""
    places = torch.arange(start, start + count)
    return places // width // size, places % width // size


def fp8_block_scaling_compute_partial_amax(tensor: Tensor, amax: Tensor, h: int, w: int, start: int, size: int) -> None:
    """Raise ``amax``, of each block of an ``h`` x ``w`` matrix, to the largest magnitudes of a part that begins at ``start``."""
    rows, columns = _find_blocks(tensor.numel(), w, start, size)
    values = tensor.reshape(-1).abs().float()
    found = torch.zeros(amax.numel()).scatter_reduce_(0, rows * amax.shape[1] + columns, values, "amax")
    amax.copy_(torch.maximum(amax, found.view(amax.shape)))


def fp8_block_scaling_partial_cast(
    tensor: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start: int, size: int, dtype: object
) -> None:
    """Cast a part of a matrix by the scales of its blocks."""
    rows, columns = _find_blocks(tensor.numel(), w, start, size)
    out.copy_(cast(tensor.reshape(-1).float(), scale[rows, columns], dtype).view(out.shape))


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], top: float, power_of_two: bool, epsilon: float
) -> None:
    """Derive scales and their reciprocals from largest magnitudes; ``lists`` is ``[amaxes, scales, reciprocals]``."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(find_scale(amax.float(), top, power_of_two, epsilon))
        inverse.copy_(torch.reciprocal(scale))
