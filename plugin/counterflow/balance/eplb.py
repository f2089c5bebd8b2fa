"""DeepSeek's `rebalance_experts`: the same arguments and results, with plans that are at least as balanced."""

import sys
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import MAX_SLOTS, Cluster, make_cluster
from counterflow.balance.loads import check_loads
from counterflow.balance.placement import EMPTY, Placement, share_evenly, sum_by_rank
from counterflow.balance.planning import check_room, choose_policy, plan_placement
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: str = "auto",
    distinct: bool = False,
) -> tuple[Any, Any, Any]:
    """Plan replicas and their slots; arguments and results are those of EPLB's function (github.com/deepseek-ai/EPLB).

    ``weight``, ``[layers, logical experts]``, is the load of each expert. The results are torch tensors if it is one, else numpy
    arrays, all int64: ``[layers, num_replicas]``, the expert of each replica; ``[layers, experts, X]``, the replicas of each
    expert, padded with -1; ``[layers, experts]``, their number. As in EPLB, groups stay on their nodes if ``num_nodes`` divides
    ``num_groups``, and are ignored otherwise.

    ``policy`` is that of `plan_placement`. ``deepseek`` equals EPLB element by element; any other policy is at least as balanced
    in every layer. It puts two replicas of an expert on one GPU only if EPLB's plan does so and is better; with ``distinct``,
    never. A layer without any load gets EPLB's plan, unless ``distinct``. Raises `BalanceError`, a ValueError, for loads or
    numbers that cannot work.
    """
    torch = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(weight, torch.Tensor)
    values = weight.detach().float().cpu() if is_tensor else weight
    maps = _rebalance(values, is_tensor, num_replicas, num_groups, num_nodes, num_gpus, policy, distinct)
    return tuple(map(torch.from_numpy, maps)) if is_tensor and torch is not None else maps


def _rebalance(
    values: Any, is_tensor: bool, replicas: int, groups: int, nodes: int, gpus: int, policy: str, distinct: bool
) -> tuple[Array, Array, Array]:
    from counterflow.balance.kernels.deepseek import place_as_deepseek

    sizes = {"replicas": replicas, "groups": groups, "nodes": nodes, "GPUs": gpus}
    replicas, groups, nodes, gpus = (take_whole(size, name, 1, MAX_SLOTS, BalanceError) for name, size in sizes.items())
    loads = check_loads(values, "weight")
    # EPLB uses nodes only if they divide the groups, so only then they have to divide the GPUs.
    by_node = groups % nodes == 0 or policy in ("hierarchical", "spill")
    cluster = make_cluster(gpus, replicas, nodes if by_node else 1)
    chosen = choose_policy(policy, groups, loads.shape[1], cluster)
    if distinct and chosen == "deepseek":
        raise BalanceError("distinct under policy deepseek, which may put an expert on a GPU twice; allowed: any other policy")
    check_room(loads.shape[1], cluster, "deepseek")
    # torch rounds the sums of groups in its own way, so they are taken from the tensor.
    sums = values.reshape(len(loads), groups, -1).sum(-1).numpy() if is_tensor and by_node else None
    reference = place_as_deepseek(loads, replicas, groups, nodes, gpus, sums)
    if chosen == "deepseek":
        return reference
    try:
        experts = plan_placement(loads, cluster, groups, chosen).placement.experts
    except BalanceError:
        # EPLB fills slots for which there is no other expert with second copies.
        if distinct:
            raise
        return reference
    better = find_slowest(loads, cluster, reference[0]) < find_slowest(loads, cluster, experts)
    taken = better | ~loads.any(1)
    if distinct:
        taken &= ~find_doubles(cluster, reference[0])
    held, slots_of, counts = map_copies(np.where(taken[:, None], reference[0], experts), loads.shape[1])
    width = min(slots_of.shape[2], reference[1].shape[2])
    slots_of[taken, :, :width] = reference[1][taken, :, :width]
    return held, slots_of, counts


def find_slowest(loads: Array, cluster: Cluster, experts: Array) -> Array:
    """Return ``float64[layers]``, the slowest rank's load."""
    return np.asarray(sum_by_rank(share_evenly(loads, Placement(cluster, experts)), cluster).max(1))


def find_doubles(cluster: Cluster, experts: Array) -> Array:
    """Return ``bool[layers]``: whether some rank holds an expert twice."""
    held = np.sort(experts.reshape(len(experts), cluster.ranks, -1), axis=2)
    return np.asarray(((held[..., 1:] == held[..., :-1]) & (held[..., 1:] != EMPTY)).any((1, 2)))


def map_copies(experts: Array, total: int) -> tuple[Array, Array, Array]:
    """Return EPLB's three maps of ``experts[layers, slots]``, all slots filled; copies are in the order of their slots."""
    layers, slots = experts.shape
    counts = np.zeros((layers, total), np.int64)
    layer = np.arange(layers)[:, None]
    np.add.at(counts, (layer, experts), 1)
    order = np.argsort(experts, axis=1, kind="stable")
    starts = np.cumsum(counts, axis=1) - counts
    sorted_experts = np.take_along_axis(experts, order, 1)
    places = np.arange(slots) - np.take_along_axis(starts, sorted_experts, 1)
    slots_of = np.full((layers, total, int(counts.max())), -1, np.int64)
    slots_of[layer, sorted_experts, places] = order
    return experts.astype(np.int64), slots_of, counts
