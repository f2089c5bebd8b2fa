"""Made-up expert loads of the nine shapes that imbalance is measured with."""

from collections.abc import Iterator

import numpy as np

from counterflow.arrays import Array
from counterflow.bounds import take_whole
from counterflow.errors import BalanceError

WORKLOADS = {
    "balanced": "all experts alike",
    "hot_set": "four experts get 40 % of the tokens",
    "hot_rank": "the experts of rank 3 get 40 %",
    "spread": "log-normal loads with sigma 1",
    "zero_ranks": "the experts of the first two ranks get nothing",
    "rotating_step": "four experts get 40 %, others in every step",
    "rotating_micro": "four experts get 40 %, others in every micro-batch",
    "burst": "all alike, but a hot set in one micro-batch of ten",
    "drift": "log-normal loads whose logarithms walk by 0.05 a micro-batch",
}
STEP = 8
"""Micro-batches of a step: a hot set that rotates per step stays that long."""
HOT_EXPERTS, HOT_SHARE, HOT_RANK, IDLE_RANKS = 4, 0.4, 3, 2
BURST_EVERY, BURST_AT = 10, 7
WALK = 0.05
# Shares of a micro-batch are gamma variables around the expected ones, as of so many draws: 1/64 varies by an eighth of itself.
CONCENTRATION = 4000
MOST_COUNTS = 2**27


def make_workload(
    kind: str,
    microbatches: int = 160,
    layers: int = 2,
    experts: int = 64,
    ranks: int = 8,
    tokens: int = 16384,
    top_k: int = 6,
    seed: int = 0,
) -> Array:
    """Return ``int64[micro-batches, layers, experts]``, tokens per expert in a load of one of `WORKLOADS`.

    Every micro-batch has ``tokens`` tokens, each for ``top_k`` experts; no expert is expected to get one twice. Experts lie in
    order on ``ranks`` ranks. The same numbers give the same loads. Raises `BalanceError` for a kind that is not known and for
    sizes that cannot be.
    """
    sizes = {"micro-batches": microbatches, "layers": layers, "experts": experts, "ranks": ranks, "tokens": tokens}
    for name, size in {**sizes, "top-k": top_k}.items():
        take_whole(size, name, 1, error=BalanceError)
    take_whole(seed, "seed", 0, error=BalanceError)
    _check_sizes(kind, microbatches * layers * experts, experts, ranks, tokens * top_k)
    if top_k > experts:
        raise BalanceError(f"top-k {top_k} of {experts} experts; allowed: 1 to {experts}")
    random = np.random.default_rng([seed, list(WORKLOADS).index(kind)])
    counts = np.empty((microbatches, layers, experts), np.int64)
    for layer in range(layers):
        for batch, expected in enumerate(_list_shares(kind, random, microbatches, experts, ranks)):
            capped = np.minimum(expected / expected.sum(), 1 / top_k)
            shares = random.gamma(np.maximum(CONCENTRATION * capped, 1e-9))
            counts[batch, layer] = random.multinomial(tokens * top_k, shares / shares.sum())
    return counts


def _list_shares(kind: str, random: np.random.Generator, microbatches: int, experts: int, ranks: int) -> Iterator[Array]:
    """Yield what each expert of a layer is expected to get, ``float64[experts]``, micro-batch by micro-batch."""
    hot = random.choice(experts, HOT_EXPERTS, replace=False)
    logits = random.normal(0, 1, experts)
    own = experts // ranks
    still = np.ones(experts)
    if kind == "spread":
        still = np.exp(random.normal(0, 1, experts))
    elif kind == "hot_rank":
        still = _heat(experts, np.arange(HOT_RANK * own, (HOT_RANK + 1) * own))
    elif kind == "zero_ranks":
        still[: IDLE_RANKS * own] = 0
    for batch in range(microbatches):
        if kind == "rotating_micro" or (kind == "rotating_step" and batch % STEP == 0):
            hot = random.choice(experts, HOT_EXPERTS, replace=False)
        if kind in ("hot_set", "rotating_step", "rotating_micro") or (kind == "burst" and batch % BURST_EVERY == BURST_AT):
            yield _heat(experts, hot)
        elif kind == "drift":
            logits += random.normal(0, WALK, experts)
            yield np.exp(logits)
        else:
            yield still


def _heat(experts: int, hot: Array) -> Array:
    """Return shares of which ``hot`` experts have `HOT_SHARE` together, the others the rest."""
    shares = np.full(experts, (1 - HOT_SHARE) / (experts - len(hot)))
    shares[hot] = HOT_SHARE / len(hot)
    return shares


def _check_sizes(kind: str, counts: int, experts: int, ranks: int, choices: int) -> None:
    if kind not in WORKLOADS:
        raise BalanceError(f"workload {kind!r}; allowed: {', '.join(WORKLOADS)}")
    if counts > MOST_COUNTS:
        raise BalanceError(f"{counts} counts of micro-batches, layers and experts; allowed: {MOST_COUNTS} at most")
    if experts <= HOT_EXPERTS or experts % ranks:
        raise BalanceError(
            f"{experts} experts on {ranks} ranks; allowed: more than {HOT_EXPERTS} experts, a multiple of the ranks"
        )
    least = {"hot_rank": HOT_RANK + 1, "zero_ranks": IDLE_RANKS + 1}.get(kind, 1)
    if ranks < least:
        raise BalanceError(f"workload {kind} on {ranks} ranks; allowed: {least} ranks or more")
    if choices > 2**31 - 1:
        raise BalanceError(f"{choices} choices of experts in a micro-batch; allowed: {2**31 - 1} at most, fewer tokens or top-k")
