"""DeepSeek's own balancer, equal to it element by element; importing this loads the compiler.

Source: the redundant experts of DeepSeek-V3 (arXiv 2412.19437, section 3.4), whose planning is published as deepseek-ai/EPLB.
Groups of experts are packed to nodes; inside a node every spare slot goes to the expert with the most load per copy; the copies
are packed to GPUs. To pack is to take items from the heaviest on and to give each to the lightest pack that has room, the first
of equals. Loads are float32 throughout and sums are rounded as they grow, since a last bit can decide who is heavier; where items
are equally heavy, the way in which they are sorted decides, see `introsort`.
"""

import heapq

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.kernels.introsort import sort_descending
from counterflow.compiling import compile_fast
from counterflow.errors import BalanceError


def place_as_deepseek(
    weight: Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, group_sums: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the maps of DeepSeek's `rebalance_experts`, all int64: ``phy2log``, ``log2phy``, ``logcnt``.

    ``weight[layers, experts]``: loads in any one unit, taken as float32. ``phy2log[layers, replicas]``: the expert in each slot;
    ``log2phy[layers, experts, most copies]``: each expert's slots, -1 behind the last; ``logcnt[layers, experts]``: its copies.
    Where nodes do not divide groups, groups and nodes are taken as one, as there.

    ``group_sums[layers, groups]``: float32, what the loads of each group sum to; read only where a node has several groups. torch
    sums in an order of its own, so for loads from a tensor give its ``weight.float().unflatten(-1, (num_groups, -1)).sum(-1)``.
    Left out, sums are taken in float64 and rounded once. That is the same for whole numbers while no group exceeds 2**24. Above
    it, and for fractions, the last bit may differ from torch's, which shows where two groups or two nodes differ by no more.

    Raises `BalanceError` for loads below 0 or not finite, for other shapes, for fewer slots than experts, and for numbers that do
    not divide.
    """
    with np.errstate(over="ignore"):
        loads = np.ascontiguousarray(weight, np.float32)
    if np.ndim(weight) != 2 or 0 in loads.shape:
        raise BalanceError(f"weight of shape {np.shape(weight)}; allowed: [layers, experts], one or more of each")
    # Written so that a NaN, which the sort must not meet, is refused.
    if not ((loads >= 0) & (loads < np.inf)).all():
        raise BalanceError(f"weight from {loads.min()} to {loads.max()} as float32; allowed: finite numbers, 0 or more")
    sizes = (num_replicas, num_groups, num_nodes, num_gpus)
    if min(sizes) < 1:
        raise BalanceError(f"replicas, groups, nodes and GPUs of {', '.join(map(str, sizes))}; allowed: 1 or more of each")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, experts = loads.shape
    _check_sizes(experts, num_replicas, num_groups, num_nodes, num_gpus)
    if group_sums is None or num_groups == num_nodes:
        group_sums = loads.reshape(layers, num_groups, -1).sum(-1, dtype=np.float64)
    sums = np.ascontiguousarray(group_sums, np.float32)
    if sums.shape != (layers, num_groups) or np.isnan(sums).any():
        raise BalanceError(f"group sums of shape {sums.shape}; allowed: numbers, [{layers} layers, {num_groups} groups]")
    phy2log, copy, logcnt = place_layers(loads, sums, num_replicas, num_nodes, num_gpus)
    log2phy = np.full((layers, experts, logcnt.max()), -1)
    log2phy[np.arange(layers)[:, None], phy2log, copy] = np.arange(num_replicas)
    return phy2log, log2phy, logcnt


def _check_sizes(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if replicas < experts:
        raise BalanceError(f"{replicas} replicas for {experts} experts; allowed: {experts} or more, a slot for each expert")
    for name, count, unit, parts in (
        ("experts", experts, "groups", groups),
        ("GPUs", gpus, "nodes", nodes),
        ("replicas", replicas, "GPUs", gpus),
    ):
        if count % parts:
            raise BalanceError(f"{count} {name} in {parts} {unit}; allowed: a number of {unit} that divides the {name}")


@compile_fast
def place_layers(weight: Array, group_sums: Array, slots: int, nodes: int, gpus: int) -> tuple[Array, Array, Array]:
    """Return, for every layer, each slot's expert, which of the expert's copies it is, and each expert's number of copies."""
    layers, experts = weight.shape
    held = np.empty((layers, slots), np.int64)
    copy = np.empty((layers, slots), np.int64)
    copies = np.empty((layers, experts), np.int64)
    own, width = experts // nodes, slots // nodes
    for layer in range(layers):
        ordered = order_by_node(group_sums[layer], experts, nodes)
        for node in range(nodes):
            members = ordered[node * own : (node + 1) * own]
            loads = weight[layer][members]
            chosen, number, count = replicate(loads, width)
            copies[layer][members] = count
            shares = np.empty(width, np.float32)
            for item in range(width):
                shares[item] = loads[chosen[item]] / np.float32(count[chosen[item]])
            place = pack(shares, gpus // nodes) + node * width
            held[layer][place] = members[chosen]
            copy[layer][place] = number
    return held, copy, copies


@compile_fast
def order_by_node(group_sums: Array, experts: int, nodes: int) -> Array:
    """Return the experts, those of the first node first: groups packed to nodes by their sums."""
    size = experts // len(group_sums)
    ordered = np.empty(experts, np.int64)
    for group, place in enumerate(pack(group_sums, nodes)):
        ordered[place * size : (place + 1) * size] = np.arange(group * size, (group + 1) * size)
    return ordered


@compile_fast
def replicate(loads: Array, slots: int) -> tuple[Array, Array, Array]:
    """Return, before packing, each slot's expert and which of its copies it is, and the experts' numbers of copies.

    The first slots hold every expert once; each further one goes to the largest load per copy, the first of equals.
    """
    experts = len(loads)
    chosen = np.arange(slots)
    number = np.zeros(slots, np.int64)
    count = np.ones(experts, np.int64)
    heaviest = [(-loads[expert], expert) for expert in range(experts)]
    heapq.heapify(heaviest)
    for slot in range(experts, slots):
        expert = heaviest[0][1]
        chosen[slot], number[slot] = expert, count[expert]
        count[expert] += 1
        heapq.heapreplace(heaviest, (-(loads[expert] / np.float32(count[expert])), expert))
    return chosen, number, count


@compile_fast
def pack(loads: Array, packs: int) -> Array:
    """Return each item's place, counted through all packs: the heaviest item first, to the lightest pack that has room.

    Packs take as many items each. Where that is one, items stay in their order.
    """
    room = len(loads) // packs
    if room == 1:
        return np.arange(packs)
    places = np.empty(len(loads), np.int64)
    filled = np.zeros(packs, np.int64)
    lightest = [(np.float32(0), number) for number in range(packs)]
    for item in sort_descending(loads):
        load, number = lightest[0]
        places[item] = number * room + filled[number]
        filled[number] += 1
        if filled[number] < room:
            heapq.heapreplace(lightest, (load + loads[item], number))
        else:
            heapq.heappop(lightest)
    return places
