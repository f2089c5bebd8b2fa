"""Lines of the log about balancing: the memory of clones, and the balancedness and traffic of each step, over all ranks."""

import numpy as np
import torch
import torch.distributed as dist

from counterflow.devices import find_device
from counterflow.trainer.balanced_layers import BalancedLayers


def announce_clones(layers: BalancedLayers | None, clones_per_rank: int) -> None:
    """Print the memory of clones, the most of any rank, on rank 0. Every rank calls it; one without MoE layers passes None.

    ``clones_per_rank`` is the number of slots that each layer has for itself.
    """
    shared = _announce_shared(layers)
    numbers = torch.tensor(layers.measure_memory() if layers is not None else (0, 0, 0), dtype=torch.int64)
    numbers = numbers.to(find_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    count, weights, gradients = numbers.tolist()
    if dist.get_rank() == 0 and (clones_per_rank or not shared):
        print(
            f"counterflow: eplb: {clones_per_rank} clone{'s' if clones_per_rank != 1 else ''} per rank and MoE layer; on a rank "
            f"of {count} MoE layers {weights:,} bytes of weights and {gradients:,} bytes of gradients, no optimizer state",
            flush=True,
        )


def _announce_shared(layers: BalancedLayers | None) -> int:
    """Print the memory of shared clone slots, and what it would be in slots of each layer; return how many there are per rank."""
    own = (layers.shared_clones, *layers.measure_shared(), *layers.measure_slot()) if layers is not None else (0,) * 5
    numbers = torch.tensor(own, dtype=torch.int64).to(find_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    count, weights, gradients, slot_weights, slot_gradients = numbers.tolist()
    if dist.get_rank() == 0 and count:
        print(
            f"counterflow: eplb: {count} clone{'s' if count != 1 else ''} per rank in slots that its MoE layers share: "
            f"{weights:,} bytes of weights and {gradients:,} bytes of gradients, whatever the number of layers; in slots of each "
            f"layer {count * slot_weights:,} and {count * slot_gradients:,}",
            flush=True,
        )
    return int(count)


def end_step(layers: BalancedLayers | None, microbatches: int) -> dict[str, float]:
    """End a step and return its figures over all ranks; clones count once, not in every replica of the experts.

    Every rank calls it; one without MoE layers passes None.
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


def describe_step(figures: dict[str, float]) -> str:
    """Return the figures of `end_step` in words, for the log line."""
    homes = f" homes moved: {figures['homes moved']:.0f} |" if figures["homes moved"] else ""
    return (
        f" balancedness: {figures['balancedness before']:.4f} -> {figures['balancedness']:.4f} |"
        f" clones: {figures['clones']:.0f}, {figures['clones moved']:.0f} moved, {figures['MB']:.2f} MB,"
        f" {figures['ms waited']:.1f} ms waited |{homes}"
    )
