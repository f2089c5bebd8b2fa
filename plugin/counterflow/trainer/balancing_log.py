"""What a log says of balancing: what clones take, and of each step what they gained and cost, over all ranks."""

import numpy as np
import torch
import torch.distributed as dist

from counterflow.devices import find_device
from counterflow.trainer.balanced_layers import BalancedLayers


def announce_clones(layers: BalancedLayers | None, clones_per_rank: int) -> None:
    """Print on rank 0 what the clones take, as much as on any rank. Every rank calls it, with None where it has no MoE layers."""
    numbers = torch.tensor(layers.measure_memory() if layers is not None else (0, 0, 0), dtype=torch.int64)
    numbers = numbers.to(find_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    count, weights, gradients = numbers.tolist()
    if dist.get_rank() == 0:
        print(
            f"counterflow: eplb: {clones_per_rank} clone{'s' if clones_per_rank != 1 else ''} per rank and MoE layer; on a rank "
            f"of {count} MoE layers {weights:,} bytes of weights and {gradients:,} bytes of gradients, no optimizer state",
            flush=True,
        )


def end_step(layers: BalancedLayers | None, microbatches: int) -> dict[str, float]:
    """End a step and sum it up over all ranks; of clones, what one replica of each pipeline rank's experts has.

    Every rank calls it, with None where it has no MoE layers.
    """
    numbers = np.zeros(8)
    if layers is not None:
        before, after = layers.end_step(microbatches)
        traffic = layers.traffic
        numbers[:4] = before.sum(), after.sum(), before.size, traffic.waited
        if layers.is_leader:
            numbers[4:] = traffic.clones, traffic.moved, traffic.homes, traffic.bytes
        traffic.reset()
    summed = torch.from_numpy(numbers).to(find_device())
    dist.all_reduce(summed)
    before, after, cells, waited, clones, moved, homes, size = summed.tolist()
    return {
        "balancedness before": before / max(cells, 1),
        "balancedness": after / max(cells, 1),
        "clones": clones,
        "clones moved": moved,
        "homes moved": homes,
        "MB": size / 1e6,
        "ms waited": waited / dist.get_world_size() * 1e3,
    }


def describe_step(said: dict[str, float]) -> str:
    """Return what a step's log line says of it."""
    homes = f" homes moved: {said['homes moved']:.0f} |" if said["homes moved"] else ""
    return (
        f" balancedness: {said['balancedness before']:.4f} -> {said['balancedness']:.4f} |"
        f" clones: {said['clones']:.0f}, {said['clones moved']:.0f} moved, {said['MB']:.2f} MB,"
        f" {said['ms waited']:.1f} ms waited |{homes}"
    )
