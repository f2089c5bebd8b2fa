"""Free placement: choose the copies of experts and their slots; the copies of an expert share its load evenly."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.balance.loads import LARGEST_LOAD, check_loads
from counterflow.balance.placement import Placement, divide_loads, measure_balancedness, share_evenly, sum_by_rank
from counterflow.bounds import take_number, take_whole
from counterflow.errors import BalanceError

POLICIES = ("auto", "hierarchical", "global", "spill", "deepseek")
# Spilling stops if the slowest rank has at most the mean over this: 0.95, and a little more for layers that miss it narrowly.
SPILL_TO = 0.952
# The cost of a token that is computed off its group's node, divided by the ranks, in tokens of the slowest rank.
TRAFFIC_WEIGHT = 0.1


@dataclass(frozen=True)
class Plan:
    """A placement and its expected loads.

    ``rank_loads``: ``float64[layers, ranks]``. ``bound``: ``float64[layers]``, a lower bound on the slowest rank's load under the
    same policy. ``off_node``: ``float64[layers]``, see `measure_off_node`.
    """

    placement: Placement
    rank_loads: Array
    bound: Array
    off_node: Array

    @property
    def balancedness(self) -> Array:
        """``float64[layers]``: mean over slowest rank."""
        return measure_balancedness(self.rank_loads)

    @property
    def best_balancedness(self) -> Array:
        """``float64[layers]``: an upper bound on the balancedness of any placement."""
        return divide_loads(self.rank_loads.mean(1), self.bound)


def plan_placement(
    loads: Array, cluster: Cluster, groups: int = 1, policy: str = "auto", traffic_weight: float = TRAFFIC_WEIGHT
) -> Plan:
    """Place experts and their copies in all slots of ``cluster``, so that the slowest rank of each layer has a small load.

    ``loads`` are ``[layers, experts]``, in any unit. Experts form ``groups`` groups of consecutive experts. The policies:
    ``global`` ignores groups and nodes. ``hierarchical`` assigns groups to nodes and keeps all copies there. ``spill`` begins so,
    then puts copies of hot experts on other nodes, or at last ignores nodes, if the slowest rank's load falls by more than
    ``traffic_weight`` times the off-node load per rank. ``auto`` is hierarchical if nodes divide groups, else global, as in EPLB.
    ``deepseek`` is EPLB's own plan.

    Under all policies but ``deepseek`` no rank gets two copies of an expert, and in a layer without any load all experts count
    alike. Raises `BalanceError` for loads, slots, groups or a policy that cannot work.
    """
    loads = check_loads(loads)
    policy = choose_policy(policy, groups, loads.shape[1], cluster)
    take_number(traffic_weight, "traffic weight", 0, LARGEST_LOAD, BalanceError)
    check_room(loads.shape[1], cluster, policy)
    expected = np.where(loads.any(1, keepdims=True), loads, 1.0)
    if policy == "deepseek":
        experts = place_by_eplb(loads, cluster, groups)
    elif policy == "global":
        experts = place_globally(expected, cluster)
    else:
        experts = place_by_node(expected, groups, cluster, None if policy == "hierarchical" else traffic_weight)
    placement = Placement(cluster, experts)
    rank_loads = sum_by_rank(share_evenly(loads, placement), cluster)
    bound = bound_slowest(loads, groups, cluster, policy)
    return Plan(placement, rank_loads, bound, measure_off_node(loads, groups, placement))


def choose_policy(policy: str, groups: int, experts: int, cluster: Cluster) -> str:
    """Return the policy, with ``auto`` resolved. Raises `BalanceError` for an unknown one, or groups that do not fit it."""
    if policy not in POLICIES:
        raise BalanceError(f"policy {policy!r}; allowed: {', '.join(POLICIES)}")
    if experts % take_whole(groups, "groups", 1, error=BalanceError):
        raise BalanceError(f"{groups} groups of {experts} experts; allowed: a number of groups that divides {experts}")
    if policy == "auto":
        return "global" if groups % cluster.nodes else "hierarchical"
    if policy in ("hierarchical", "spill") and groups % cluster.nodes:
        raise BalanceError(
            f"{groups} groups on {cluster.nodes} nodes; "
            f"allowed under policy {policy}: a multiple of {cluster.nodes}; or take policy global"
        )
    return policy


def check_room(experts: int, cluster: Cluster, policy: str) -> None:
    """Raise `BalanceError` if there are too few slots, or so many that a rank would need two copies of an expert."""
    if cluster.slots < experts:
        raise BalanceError(f"{cluster.slots} slots for {experts} experts; allowed: {experts} or more")
    if policy == "deepseek":
        if cluster.ranks % cluster.nodes or cluster != make_cluster(cluster.ranks, cluster.slots, cluster.nodes):
            raise BalanceError(
                f"slots per rank {list(cluster.slots_per_rank)} on nodes {list(cluster.node_of_rank)}; "
                "allowed under policy deepseek: equal ranks on equal nodes, in order"
            )
        return
    nodes = 1 if policy == "global" else cluster.nodes
    own, most = experts // nodes, max(cluster.slots_per_rank)
    if most > own:
        raise BalanceError(
            f"a rank with {most} slots for {own} experts{' of its node' if nodes > 1 else ''}; "
            "allowed: no more slots on a rank than experts"
        )
    if nodes > 1:
        least = min(int(np.count_nonzero(cluster.node_of_slot == node)) for node in range(nodes))
        if least < own:
            raise BalanceError(
                f"a node with {least} slots for {own} experts of its groups; allowed: {own} slots or more, or policy global"
            )


def place_by_eplb(loads: Array, cluster: Cluster, groups: int) -> Array:
    """Return DeepSeek's expert of each slot, ``int64[layers, slots]``."""
    from counterflow.balance.kernels.deepseek import place_as_deepseek

    return place_as_deepseek(loads, cluster.slots, groups, cluster.nodes, cluster.ranks)[0]


def place_globally(loads: Array, cluster: Cluster) -> Array:
    """Return the expert of each slot, ``int64[layers, slots]``; nodes are ignored."""
    from counterflow.balance.kernels.packing import place_layer

    return np.stack([place_layer(layer, cluster.rank_start)[0] for layer in loads])


def assign_groups(loads: Array, groups: int, cluster: Cluster) -> Array:
    """Return the node of each expert, ``int64[layers, experts]``: equally many groups per node, loads as equal as possible."""
    from counterflow.balance.kernels.packing import place_layer

    starts = np.arange(cluster.nodes + 1) * (groups // cluster.nodes)
    sums = loads.reshape(len(loads), groups, -1).sum(-1)
    node_of_group = np.empty(sums.shape, np.int64)
    for layer, weights in enumerate(sums):
        held, _ = place_layer(weights, starts)
        node_of_group[layer, held] = np.repeat(np.arange(cluster.nodes), groups // cluster.nodes)
    return np.repeat(node_of_group, loads.shape[1] // groups, axis=1)


def place_by_node(loads: Array, groups: int, cluster: Cluster, traffic_weight: float | None) -> Array:
    """Return the expert of each slot, ``int64[layers, slots]``; with a ``traffic_weight`` copies may leave their node."""
    from counterflow.balance.kernels.spilling import Nodes, place_spilling, place_within

    home = assign_groups(loads, groups, cluster)
    of_rank = np.asarray(cluster.node_of_rank)
    ranks = np.argsort(of_rank, kind="stable")
    slots = np.argsort(cluster.node_of_slot, kind="stable")
    starts = np.arange(cluster.nodes + 1)
    nodes = Nodes(
        slots,
        np.searchsorted(cluster.node_of_slot[slots], starts),
        cluster.rank_start,
        ranks,
        np.searchsorted(of_rank[ranks], starts),
        of_rank,
    )
    placed = np.stack([place_within(weights, where, nodes) for weights, where in zip(loads, home, strict=True)])
    if traffic_weight is None:
        return placed
    pace = loads.sum(1) / cluster.ranks / SPILL_TO
    spilled = np.stack(
        [place_spilling(weights, where, nodes, target) for weights, where, target in zip(loads, home, pace, strict=True)]
    )
    candidates = np.stack([placed, spilled, place_globally(loads, cluster)])
    cost = np.array([weigh_objective(loads, groups, Placement(cluster, experts), traffic_weight) for experts in candidates])
    # Ignoring nodes is only for layers in which spilling does not reach the pace, as on nodes of two ranks.
    keeps_pace = sum_by_rank(share_evenly(loads, Placement(cluster, spilled)), cluster).max(1) <= pace * (1 + 1e-9)
    cost[2, keeps_pace] = np.inf
    cheapest: Array = candidates[np.argmin(cost, axis=0), np.arange(len(loads))]
    return cheapest


def weigh_objective(loads: Array, groups: int, placement: Placement, traffic_weight: float) -> Array:
    """Return ``float64[layers]``: the slowest rank's load plus ``traffic_weight`` times the off-node load per rank."""
    slowest = sum_by_rank(share_evenly(loads, placement), placement.cluster).max(1)
    objective: Array = slowest + traffic_weight * measure_off_node(loads, groups, placement) / placement.cluster.ranks
    return objective


def measure_off_node(loads: Array, groups: int, placement: Placement) -> Array:
    """Return ``float64[layers]``: the load computed off the node of its expert's group.

    Groups are assigned to nodes, equally many to each, so that this load is smallest: an assignment problem, solved exactly. It
    is 0 if nodes do not divide groups, since groups then have no node.
    """
    from scipy.optimize import linear_sum_assignment

    nodes, total = placement.cluster.nodes, loads.sum(1)
    if nodes == 1 or groups % nodes:
        return np.zeros(len(loads))
    here = np.zeros((len(loads), groups, nodes))
    group = placement.experts * groups // loads.shape[1]
    np.add.at(here, (np.arange(len(loads))[:, None], group, placement.cluster.node_of_slot), share_evenly(loads, placement))
    places = np.repeat(here, groups // nodes, axis=2)
    kept = np.array([layer[linear_sum_assignment(layer, maximize=True)].sum() for layer in places])
    # Sums in another order differ by rounding.
    return np.where(total - kept > 1e-9 * total, total - kept, 0.0)


def bound_slowest(loads: Array, groups: int, cluster: Cluster, policy: str) -> Array:
    """Return ``float64[layers]``, a lower bound on the slowest rank's load in any placement under this policy.

    It is the largest of these: the mean rank's load; the largest load of a copy, with the numbers of copies that make it
    smallest; if groups stay on their nodes, the largest group's load over the ranks of a node.
    """
    from counterflow.balance.kernels.packing import count_copies

    largest = [(weights / count_copies(weights, cluster.slots, cluster.slots)).max() for weights in loads]
    bounds = [loads.sum(1) / cluster.ranks, np.array(largest)]
    if groups % cluster.nodes == 0 and policy in ("hierarchical", "deepseek"):
        ranks = max(cluster.node_of_rank.count(node) for node in range(cluster.nodes))
        bounds.append(loads.reshape(len(loads), groups, -1).sum(-1).max(1) / ranks)
    return np.max(bounds, axis=0)
