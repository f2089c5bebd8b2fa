"""One of two ranks that record a MoE layer's routing with Megatron's RouterReplay and replay it under clones.

The job is {"results"}: rank 0 writes how many tokens the recorded and the replayed run dealt to each slot of all ranks, how many
tokens were dealt otherwise, and how many a router that chose anew would have dealt otherwise.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import counterflow
from counterflow.balance.placement import Placement

EXPERTS, CLONES, WIDTH, TOKENS = 8, 2, 32, 64


def build_layer() -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=2, moe_ffn_hidden_size=WIDTH, num_moe_experts=EXPERTS,
        moe_router_topk=2, moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall", add_bias_linear=False,
        expert_model_parallel_size=2, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        moe_enable_routing_replay=True,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS).submodules.mlp
    return MoELayer(config, getattr(spec, "submodules", None) or spec.keywords["submodules"], layer_number=1)


def run(job: dict[str, Any]) -> None:
    """Run the job."""
    # An even split sends tokens to every clone.
    counterflow.enable({"eplb": True, "eplb_clones_per_rank": CLONES, "eplb_split": "even"})
    dist.init_process_group("gloo")
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from counterflow.megatron.state import layer_slots

    layer = build_layer()
    slots = layer_slots[layer]
    held = slots._table.placement
    experts = held.experts.copy()
    # Rank 0 has clones of two experts of rank 1, which has clones of two of rank 0.
    experts[experts < 0] = [4, 5, 0, 1]
    slots.hold(Placement(held.cluster, experts, held.homes), torch.device("cpu"))
    dealt: list[np.ndarray[Any, Any]] = []
    deal = slots.deal

    def watch(*args: Any) -> Any:
        result = deal(*args)
        dealt.append(result[1].numpy().copy())
        return result

    slots.deal = watch
    torch.manual_seed(dist.get_rank())
    first, second = (torch.randn(TOKENS, 1, WIDTH) for _ in range(2))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    layer(first)
    RouterReplay.clear_global_router_replay_action()
    layer(second)
    RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    # Other hidden states, for which the router alone would choose other experts.
    layer(second)
    recorded, chosen, replayed = dealt
    counts = [torch.from_numpy(one.sum(0)) for one in (recorded, replayed)]
    others = torch.tensor([(recorded != one).any(1).sum() for one in (replayed, chosen)])
    for one in (*counts, others):
        dist.all_reduce(one)
    if dist.get_rank() == 0:
        said = {"slots": [one.tolist() for one in counts], "replayed": int(others[0]), "chosen": int(others[1])}
        Path(job["results"]).write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()
