"""A made-up record of expert balancing, as a training run writes it: ``python -m tests.support.made_record DIR [STEPS]``."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.files.recorded import record_step
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, measure_balancedness, share_evenly, sum_by_rank


def make_record(
    directory: Path, parts: dict[int, list[int]], steps: range, experts: int = 16, ranks: int = 4, microbatches: int = 2
) -> dict[int, Array]:
    """Append steps of pipeline ranks, each with its layers; return ``int64[micro-batches, layers, experts]`` of each."""
    return {rank: _record_part(directory, rank, layers, steps, experts, ranks, microbatches) for rank, layers in parts.items()}


def _record_part(
    directory: Path, rank: int, layers: list[int], steps: range, experts: int, ranks: int, microbatches: int
) -> Array:
    placement = make_home_placement(len(layers), experts, ranks, 1)
    random = np.random.default_rng((rank, steps.start))
    drift = random.normal(0, 1, (len(layers), experts))
    recorded = []
    for step in steps:
        drift = 0.97 * drift + 0.25 * random.normal(0, 1, drift.shape)
        share = np.exp((0.4 + 0.15 * (np.arange(len(layers)) % 5))[:, None] * drift)
        counts = random.poisson(1000 * share, (microbatches, *share.shape))
        planned = place_clones(counts[0] if not recorded else recorded[-1].mean(0), placement)
        record_step(directory, rank, counts, describe_step(step, layers, counts, placement, planned, random))
        recorded.append(counts)
        placement = planned
    return np.concatenate(recorded)


def place_clones(loads: Array, placement: Placement) -> Placement:
    """Give the rank of least load in homes a clone of the hottest expert of the rank of most, and so on."""
    assert placement.homes is not None
    held = np.full_like(placement.experts, EMPTY)
    np.put_along_axis(held, placement.homes, np.arange(loads.shape[1]), 1)
    homes = Placement(placement.cluster, held.copy(), placement.homes)
    sums = sum_by_rank(share_evenly(loads, homes), placement.cluster)
    for layer, order in enumerate(sums.argsort(1)):
        hot = [
            max((int(e) for e in held[layer].reshape(len(order), -1)[rank] if e != EMPTY), key=lambda e: loads[layer, e])
            for rank in order
        ]
        spare = [int(np.flatnonzero(row == EMPTY)[0]) for row in held[layer].reshape(len(order), -1)]
        for low, high in zip(range(len(order) // 2), reversed(range(len(order))), strict=False):
            rank = order[low]
            homes.experts[layer, rank * held.shape[1] // len(order) + spare[rank]] = hot[high]
    return homes


def describe_step(
    step: int, layers: list[int], counts: Array, old: Placement, new: Placement, random: np.random.Generator
) -> dict[str, Any]:
    """Return a step's line, as the training side writes it."""
    cluster = new.cluster
    before = measure_balancedness(counts.reshape(len(counts), len(layers), cluster.ranks, -1).sum(-1))
    after = np.stack([measure_balancedness(sum_by_rank(share_evenly(each, new), cluster)) for each in counts])
    clones = int((new.experts != EMPTY).sum() - counts[0].size)
    weights, gradients = random.gamma(40, 0.05, 2)
    return {
        "step": step,
        "layers": layers,
        "ranks": cluster.ranks,
        "clones_per_rank": cluster.slots // cluster.ranks - counts.shape[2] // cluster.ranks,
        "microbatches": len(counts),
        "balancedness_before": before.mean(0),
        "balancedness_after": after.mean(0),
        "experts": new.experts,
        "homes": new.homes,
        "clones": clones,
        "moved": int(((new.experts != old.experts) & (new.experts != EMPTY)).sum()),
        "homes_moved": 0,
        "bytes": clones * 2 * 3_000_000,
        "weights_ms": round(weights, 3),
        "gradients_ms": round(gradients, 3),
        "waited_ms": round(0.3 * gradients * random.random(), 3),
    }


if __name__ == "__main__":
    make_record(Path(sys.argv[1]), {0: [1, 2, 7], 4: [3, 4, 5, 6]}, range(1, 1 + int((*sys.argv, "300")[2])), 32, 8)
