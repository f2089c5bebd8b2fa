"""A made-up replay of expert balancing."""

import numpy as np

from counterflow.balance.cluster import make_cluster
from counterflow.balance.placement import measure_balancedness
from counterflow.balance.replay import METHODS, Replay


def make_replay(steps: int = 30, layers: int = 3, ranks: int = 8, nodes: int = 2, rate: float = 0.5) -> Replay:
    """Loads whose spread shrinks from method to method, layer 0 the best under fixed homes, the last the worst."""
    random = np.random.default_rng(steps + layers + ranks)
    spread = np.linspace(0.2, 0.6, layers)[:, None]
    loads = {
        name: (1000 * random.lognormal(0, share * spread, (steps, layers, ranks))).astype(np.int64)
        for name, share in zip(METHODS, (1.0, 0.3, 0.1, 0.05), strict=True)
    }
    moves = random.poisson(rate, (steps, layers))
    far = random.binomial(moves, 0.3 if nodes > 1 else 0.0)
    balancedness = {name: measure_balancedness(each) for name, each in loads.items()}
    return Replay(make_cluster(ranks, 9 * ranks, nodes), 50, balancedness, loads["fixed"], loads["counterflow"], moves, far)
