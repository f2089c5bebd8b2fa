"""How much longer than the mean the slowest expert-parallel rank takes: forced, natural, or recorded routing."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from counterflow.balance import replay_trace
from counterflow.balance.files.loads import read_trace
from counterflow.errors import BalanceError, PlanError
from counterflow.planner.constants import Constants
from counterflow.planner.layouts import Plan

# What is left of the imbalance with clones and exact splits on natural routing: `make bench-balance`.
BALANCED = 1.05


def find_imbalance(plan: Plan, constants: Constants) -> float:
    """Return the tokens of the slowest rank over the mean; raises `PlanError` for a recording that does not fit the model."""
    layout, routing = plan.layout, plan.training.routing
    ranks = layout.ep
    if ranks == 1 or routing == "forced" or not any(layer.moe for layer in plan.model.layers):
        return 1.0
    if routing == "natural":
        return BALANCED if layout.clones_per_rank else constants["general.imbalance"]
    experts = next(layer.moe.experts for layer in plan.model.layers if layer.moe is not None)
    return _measure(routing, ranks, experts, layout.clones_per_rank)


@lru_cache(maxsize=64)
def _measure(path: str, ranks: int, experts: int, clones: int) -> float:
    try:
        counts = read_trace(Path(path))
        if counts.shape[2] != experts:
            raise PlanError(
                f"training.routing {path} has {counts.shape[2]} experts and the model {experts}: give a recording of this model"
            )
        replay = replay_trace(counts, ranks, max(clones, 1))
    except BalanceError as error:
        raise PlanError(f"training.routing: {error}") from None
    method = "counterflow" if clones else "fixed"
    return float(np.mean(1.0 / replay.balancedness[method]))
