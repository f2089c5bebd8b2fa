"""Lines of the log about balancing: the memory of clones, and the balancedness and traffic of each step, over all ranks."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.devices import find_device
from counterflow.moe.loads import TIERS
from counterflow.options import AUTO, Options
from counterflow.trainer.balanced_layers import BalancedLayers

# Balancedness is counted in so many bins, of which percentiles over all ranks are read.
BINS = 1000
# The figure of a step whose forward passes were measured.
FORCED_SHARE = "share of force-balanced"


def keep_homes_where(obstacle: str | None, options: Options) -> Options:
    """Return the options of a run in which homes stay if there is an ``obstacle``, and say so on rank 0."""
    if obstacle is None or not options.moves_homes:
        return options
    if dist.get_rank() == 0:
        print(f"counterflow: eplb: homes stay where they are: --cf-eplb-rehome-interval {AUTO} {obstacle}", flush=True)
    return options.keep_homes()


def announce_clones(layers: BalancedLayers | None, clones_per_rank: int) -> int:
    """Print the memory of clones, the most of any rank, on rank 0; return the highest number that a MoE layer has.

    Every rank calls it; one without MoE layers passes None. ``clones_per_rank`` is the number of slots that each layer has for
    itself.
    """
    shared = _announce_shared(layers)
    own = (*layers.measure_memory(), max(layers.numbers)) if layers is not None else (0, 0, 0, 0)
    numbers = torch.tensor(own, dtype=torch.int64).to(find_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    count, weights, gradients, highest = numbers.tolist()
    if dist.get_rank() == 0 and (clones_per_rank or not shared):
        print(
            f"counterflow: eplb: {clones_per_rank} clone{'s' if clones_per_rank != 1 else ''} per rank and MoE layer; on a rank "
            f"of {count} MoE layers {weights:,} bytes of weights and {gradients:,} bytes of gradients, no optimizer state",
            flush=True,
        )
    return int(highest)


def _announce_shared(layers: BalancedLayers | None) -> int:
    """Print the memory of shared clone slots, and what it would be in slots of each layer; return how many there are per rank."""
    own = (0,) * 8
    if layers is not None:
        measured = *layers.measure_shared(), *layers.measure_unshared(), *layers.measure_packed(), layers.measure_kept()
        own = (layers.shared_clones, *measured)
    numbers = torch.tensor(own, dtype=torch.int64).to(find_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    count, weights, gradients, all_weights, all_gradients, packed, all_packed, kept = numbers.tolist()
    if dist.get_rank() == 0 and count:
        also = f"; of the weights FP8 data and scales are {packed:,}, in slots of each layer {all_packed:,}" if packed else ""
        also += f"; each micro-batch under way keeps up to {kept:,} bytes of weights until its backward" if kept else ""
        print(
            f"counterflow: eplb: {count} clone{'s' if count != 1 else ''} per rank in slots that its MoE layers share: "
            f"{weights:,} bytes of weights and {gradients:,} bytes of gradients, whatever the number of layers; in slots of each "
            f"layer {all_weights:,} and {all_gradients:,}{also}",
            flush=True,
        )
    return int(count)


@dataclass(frozen=True)
class StepFigures:
    """What a step's balancing was, over all ranks: figures by name, and by the layer's number those of each layer."""

    all: dict[str, float]
    layers: dict[int, dict[str, float]]


def end_step(layers: BalancedLayers | None, microbatches: int, highest: int = 0) -> StepFigures:
    """End a step and return its figures; clones and homes count once, not in every replica of the experts.

    ``highest`` is what `announce_clones` returned; without it there are no figures by layer. Every rank calls it; one without MoE
    layers passes None. All figures are summed at once.
    """
    sums, tiers, bins, rows = np.zeros(9), np.zeros(len(TIERS)), np.zeros(BINS + 1), np.zeros((highest + 1, 4))
    if layers is not None:
        loads = layers.end_step(microbatches)
        traffic = layers.traffic
        sums[:2] = traffic.waited, traffic.moving
        if layers.is_leader:
            sums[2:7] = traffic.clones, traffic.moved, traffic.homes, traffic.bytes, traffic.home_bytes
            sums[7:9] = traffic.lent, traffic.lent_bytes
        tiers += loads.tiers
        bins += np.bincount((loads.after * BINS).astype(np.int64).ravel(), minlength=len(bins))
        cells = np.stack((loads.before, loads.after, 1 / loads.after, np.ones_like(loads.after)), -1)
        np.add.at(rows, layers.numbers if highest else [0] * len(layers.numbers), cells.sum(0))
        traffic.reset()
    summed = torch.from_numpy(np.concatenate((sums, tiers, bins, rows.ravel()))).to(find_device())
    dist.all_reduce(summed)
    sums, tiers, bins, flat = np.split(summed.cpu().numpy(), np.cumsum((len(sums), len(tiers), len(bins))))
    rows = flat.reshape(-1, 4)
    waited, moving, clones, moved, homes, size, home_size, lent, lent_size = sums.tolist()
    shares = tiers / max(tiers.sum(), 1)
    each = {number: _describe_cells(row) for number, row in enumerate(rows) if number and row[-1]}
    whole = {
        **_describe_cells(rows.sum(0)),
        "balancedness p5": _find_percentile(bins, 0.05),
        "clones": clones,
        "clones moved": moved,
        "clones just in time": lent,
        "homes moved": homes,
        "MB": size / 1e6,
        "MB just in time": lent_size / 1e6,
        "MB of homes": home_size / 1e6,
        **{f"tokens {'at' if name == 'homes' else 'on'} {name}": float(share) for name, share in zip(TIERS, shares, strict=True)},
        "ms waited": waited / dist.get_world_size() * 1e3,
        "ms of homes": moving / dist.get_world_size() * 1e3,
        "ms exposed": (waited + moving) / dist.get_world_size() * 1e3,
    }
    return StepFigures(whole, each)


def _describe_cells(row: Array) -> dict[str, float]:
    """Return the means of ``float64[4]``: sums over micro-batches, and their number."""
    before, after, ratio, cells = (row / max(row[-1], 1)).tolist()
    del cells
    return {"balancedness before": before, "balancedness": after, "max over mean": ratio}


def _find_percentile(bins: Array, share: float) -> float:
    """Return the lower edge of the bin in which a share of what was counted ends; 1 if nothing was."""
    if not bins.any():
        return 1.0
    return float(np.searchsorted(bins.cumsum(), share * bins.sum())) / BINS


def describe_step(figures: dict[str, float]) -> str:
    """Return the figures of `end_step` in words, for the log line."""
    clones = figures["tokens on resident"] + figures["tokens on just in time"]
    lent = f" {figures['clones just in time']:.0f} just in time," if figures["clones just in time"] else ""
    homes = (
        f" homes moved: {figures['homes moved']:.0f}, {figures['MB of homes']:.2f} MB, {figures['ms of homes']:.1f} ms |"
        if figures["homes moved"]
        else ""
    )
    forced = f" force-balanced, forward: {figures[FORCED_SHARE]:.3f} |" if FORCED_SHARE in figures else ""
    return (
        f" balancedness: {figures['balancedness before']:.4f} -> {figures['balancedness']:.4f},"
        f" p5 {figures['balancedness p5']:.3f}, max/mean {figures['max over mean']:.3f} |"
        f" clones: {figures['clones']:.0f}, {figures['clones moved']:.0f} moved,{lent} {figures['MB']:.2f} MB,"
        f" {clones:.1%} of tokens, {figures['ms waited']:.1f} ms waited |{homes}{forced}"
    )
