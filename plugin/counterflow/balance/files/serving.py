"""Placements in the forms that inference servers read, so that a training run's loads can seed a deployment."""

import json

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.placement import Placement, count_copies
from counterflow.errors import BalanceError

# No model has more; a mistyped number must not fill the memory.
MAX_FIRST_LAYER = 1000


def render_sglang(placement: Placement, first_layer: int = 0) -> str:
    """Return JSON for SGLang's ``--init-expert-location FILE.json``: the expert in each slot, for every layer of the model.

    The server indexes rows by the model's layers, so the ``first_layer`` layers before the first with experts get rows
    too, which nothing reads but which must name every expert. Read from ``python/sglang/srt/eplb/expert_location.py``: the
    object's keys are passed on as arguments, so it has this one alone.

    Raises `BalanceError` for empty slots, unequal ranks, an expert without a slot, or a first layer below 0.
    """
    if not 0 <= first_layer <= MAX_FIRST_LAYER:
        raise BalanceError(
            f"first layer {first_layer}; allowed: 0 to {MAX_FIRST_LAYER}, the layers before the first with experts"
        )
    experts = _check_full(placement, "SGLang's")
    dense = np.arange(placement.cluster.slots) % (experts.max() + 1)
    rows = [*[dense.tolist()] * first_layer, *experts.tolist()]
    return json.dumps({"physical_to_logical_map": rows}) + "\n"


def render_vllm(placement: Placement) -> str:
    """Return JSON for vLLM-Ascend's ``eplb_config.expert_map_path``: the logical experts of each device, layer by layer.

    Layers are those with experts alone. Read from vllm-ascend's ``vllm_ascend/eplb/core/eplb_utils.py``: devices are taken in
    the order of the list, and the slots of a device are found by its experts, so none may be there twice.

    Raises `BalanceError` for empty slots, unequal ranks, an expert without a slot, or twice on one rank.
    """
    experts = _check_full(placement, "vLLM's")
    held = experts.reshape(placement.layers, placement.cluster.ranks, -1)
    ordered = np.sort(held, -1)
    twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
    if len(twice):
        layer, rank, slot = twice[0]
        raise BalanceError(
            f"layer {layer}: expert {ordered[layer, rank, slot]} is on rank {rank} twice; allowed in vLLM's form: once per rank"
        )
    layers = [
        {
            "layer_id": layer,
            "device_count": len(ranks),
            "device_list": [{"device_id": rank, "device_expert": slots} for rank, slots in enumerate(ranks)],
        }
        for layer, ranks in enumerate(held.tolist())
    ]
    return json.dumps({"moe_layer_count": placement.layers, "layer_list": layers}) + "\n"


def _check_full(placement: Placement, form: str) -> Array:
    """Return the slots' experts: as many slots on each rank, all of them filled, no expert left out."""
    widths = placement.cluster.slots_per_rank
    if len(set(widths)) > 1:
        raise BalanceError(f"{min(widths)} to {max(widths)} slots per rank; allowed in {form} form: as many on each")
    experts = placement.experts
    empty = np.argwhere(experts < 0)
    if len(empty):
        raise BalanceError(f"layer {empty[0, 0]}: slot {empty[0, 1]} is empty; allowed in {form} form: an expert in every slot")
    missing = np.argwhere(count_copies(placement, int(experts.max()) + 1) == 0)
    if len(missing):
        raise BalanceError(f"layer {missing[0, 0]}: expert {missing[0, 1]} has no slot; allowed in {form} form: one or more each")
    return experts
