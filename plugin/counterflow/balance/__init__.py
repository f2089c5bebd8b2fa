"""Expert placement: replicate, pack, split tokens, predict loads, move; no torch. See docs/balance.md.

What is compiled is loaded with the first call that needs it.
"""

from counterflow.balance.changes import match_ranks, take_if_worth
from counterflow.balance.clones import ClonePlan, plan_clones
from counterflow.balance.cluster import Cluster, make_cluster
from counterflow.balance.eplb import rebalance_experts
from counterflow.balance.homes import HomePlan, plan_homes
from counterflow.balance.moves import Moves, keep_slots, plan_moves
from counterflow.balance.placement import (
    EMPTY,
    Placement,
    make_home_placement,
    measure_balancedness,
    share_evenly,
    sum_by_rank,
)
from counterflow.balance.planning import POLICIES, Plan, plan_placement
from counterflow.balance.prediction import LoadPredictor
from counterflow.balance.replay import Replay, replay_trace
from counterflow.balance.shares import share_tokens
from counterflow.balance.split import split_tokens
from counterflow.balance.workloads import WORKLOADS, make_workload
from counterflow.errors import BalanceError

__all__ = [
    "EMPTY",
    "POLICIES",
    "WORKLOADS",
    "BalanceError",
    "ClonePlan",
    "Cluster",
    "HomePlan",
    "LoadPredictor",
    "Moves",
    "Placement",
    "Plan",
    "Replay",
    "keep_slots",
    "make_cluster",
    "make_home_placement",
    "make_workload",
    "match_ranks",
    "measure_balancedness",
    "plan_clones",
    "plan_homes",
    "plan_moves",
    "plan_placement",
    "rebalance_experts",
    "replay_trace",
    "share_evenly",
    "share_tokens",
    "split_tokens",
    "sum_by_rank",
    "take_if_worth",
]
