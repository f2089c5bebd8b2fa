"""The token split: the number of an expert's tokens that each of its slots computes."""

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels import LARGEST_SUM
from counterflow.balance.placement import Placement
from counterflow.errors import BalanceError


def split_tokens(counts: Array, placement: Placement) -> Array:
    """Return ``int64[layers, slots]``, the tokens of each slot, so that every layer's slowest rank is as fast as possible.

    ``counts``, ``int64[layers, experts]``, are the tokens of one micro-batch. The split is exact, and the same on all machines,
    since all arithmetic is in integers. Only as many tokens as needed leave an expert's home (its first slot, without homes).
    Raises `BalanceError` for counts that do not fit the placement.
    """
    from counterflow.balance.kernels.flow import split_layers

    counts = check_split(counts, placement)
    homes = np.full(counts.shape, -1) if placement.homes is None else placement.homes
    cluster = placement.cluster
    return np.asarray(split_layers(counts, placement.experts, cluster.rank_of_slot, cluster.rank_start, homes))


def check_split(counts: Array, placement: Placement, most_tokens: float = LARGEST_SUM) -> Array:
    """Return ``counts`` as ``int64[layers, experts]``.

    Raises `BalanceError` unless they are whole numbers from 0 that fit the placement, of ``most_tokens`` a layer at most.
    """
    counts = np.ascontiguousarray(counts)
    if counts.dtype.kind not in "iu" or counts.ndim != 2 or counts.shape[0] != placement.layers or counts.min(initial=0) < 0:
        raise BalanceError(
            f"counts of type {counts.dtype} and shape {counts.shape}; allowed: whole numbers, 0 or more, "
            f"[layers, experts] of the placement's {placement.layers} layers"
        )
    most = counts.sum(1, dtype=np.float64).max(initial=0)
    if most > most_tokens:
        raise BalanceError(f"counts of {most:g} tokens in a layer; allowed: {most_tokens:g} at most")
    if placement.homes is None or placement.homes.shape != counts.shape:
        _check_copies(counts, placement)
    return counts.astype(np.int64, copy=False)


def _check_copies(counts: Array, placement: Placement) -> None:
    """Raise `BalanceError` unless each expert is in a slot of each layer, as homes say of themselves."""
    held = placement.experts.max(initial=-1)
    copied = np.zeros(counts.shape, np.bool_)
    if held < counts.shape[1]:
        layer, slot = np.nonzero(placement.experts >= 0)
        copied[layer, placement.experts[layer, slot]] = True
    if held >= counts.shape[1] or not copied.all():
        raise BalanceError(
            f"counts of {counts.shape[1]} experts for a placement that holds experts up to {held}; "
            "allowed: each expert in a slot of each layer, and no other"
        )
