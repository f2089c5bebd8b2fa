"""Replay of recorded routing: plan from the past only, score on what follows."""

from dataclasses import dataclass

from counterflow.balance.cluster import Array, Cluster

METHODS = ("fixed", "eplb", "counterflow", "oracle")


@dataclass(frozen=True)
class Replay:
    """What a replay measured, over T scored micro-batches, L layers, R ranks.

    ``first``: the index in the trace of the first scored micro-batch. ``balancedness[method]``: ``float64[T, L]``, a method being
    one of `METHODS`. ``fixed_loads`` and ``loads``: ``int64[T, L, R]``, tokens per rank with fixed homes and with counterflow's
    placement. ``moves``: ``int64[T, L]``, clones that counterflow sent before that micro-batch, ``off_node_moves`` of them from
    another node.
    """

    cluster: Cluster
    first: int
    balancedness: dict[str, Array]
    fixed_loads: Array
    loads: Array
    moves: Array
    off_node_moves: Array
