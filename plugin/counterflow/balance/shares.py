"""Shares of the token split: the number of an expert's tokens that each source sends to each of the expert's slots."""

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels import LARGEST_SUM
from counterflow.balance.placement import Placement
from counterflow.errors import BalanceError


def share_tokens(counts: Array, placement: Placement, rank_of_source: Array) -> Array:
    """Return ``int64[sources, slots]``: the tokens that each source sends to each slot, of one layer and micro-batch.

    ``counts``, ``int64[sources, experts]``, are the tokens of each source for each expert. ``placement`` has a layer, and homes.
    ``rank_of_source``, ``int64[sources]``, is the rank of each source; a rank may have several. A slot gets as many tokens as in
    `split_tokens`, so the slowest rank is as fast as possible. Under this condition as many tokens as possible stay on their
    source's rank, and then as many as possible on its node. All arithmetic is in integers, so the result is the same on all
    machines. Raises `BalanceError` for arguments that do not fit the placement.
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
