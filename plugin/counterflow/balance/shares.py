"""Shares of the token split: how many of an expert's tokens each source sends to each of its slots."""

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels import LARGEST_SUM
from counterflow.balance.placement import Placement
from counterflow.errors import BalanceError


def share_tokens(counts: Array, placement: Placement, rank_of_source: Array) -> Array:
    """Return ``int64[sources, slots]``: the tokens that each source sends to each slot, of one layer and micro-batch.

    ``counts``: ``int64[sources, experts]``, what each source has for each expert. ``placement``: one layer, with homes.
    ``rank_of_source``: ``int64[sources]``, where each source sits; several may sit on a rank. All sources together send to a slot
    what `split_tokens` gives it, so that the slowest rank is as fast as it can be. Within that, as many tokens as can be stay on
    their source's rank, then as many as can be on its node. Integers alone, the same wherever it is computed. Raises
    `BalanceError` for what does not fit the placement.
    """
    from counterflow.balance.kernels.sharing import share_layer

    counts, rank_of_source = np.asarray(counts), np.asarray(rank_of_source)
    homes, cluster = placement.homes, placement.cluster
    if homes is None or len(homes) != 1:
        raise BalanceError(
            f"a placement of {placement.layers} layers {'without' if homes is None else 'with'} homes; "
            "allowed: one layer, with homes"
        )
    if counts.dtype.kind not in "iu" or counts.ndim != 2 or counts.shape[1] != homes.shape[1]:
        raise BalanceError(
            f"counts of type {counts.dtype} and shape {counts.shape}; "
            f"allowed: whole numbers, [sources, {homes.shape[1]} experts of the placement]"
        )
    if rank_of_source.dtype.kind not in "iu" or rank_of_source.shape != counts.shape[:1]:
        raise BalanceError(
            f"ranks of sources of type {rank_of_source.dtype} and shape {rank_of_source.shape}; "
            f"allowed: whole numbers, one for each of the {len(counts)} sources of counts"
        )
    fits, shares = share_layer(
        np.ascontiguousarray(counts, np.int64),
        placement.experts[0],
        homes[0],
        cluster.rank_of_slot,
        cluster.rank_start,
        cluster.node_of_slot,
        np.ascontiguousarray(rank_of_source, np.int64),
    )
    if not fits:
        raise BalanceError(
            f"counts from {counts.min(initial=0)} to {counts.max(initial=0)} of sources on ranks {rank_of_source.min(initial=0)} "
            f"to {rank_of_source.max(initial=0)}; allowed: counts from 0 to {LARGEST_SUM / max(counts.size, 1):g}, "
            f"ranks from 0 to {cluster.ranks - 1}"
        )
    return shares
