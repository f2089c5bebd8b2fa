"""A training loop of one's own over megatron-core, without ``megatron.training``: DualPipeV with cloned experts.

    torchrun --nproc-per-node 4 examples/core_loop/train.py           with the plugin
    torchrun --nproc-per-node 4 examples/core_loop/train.py --plain   the same loop without it, under Megatron's 1F1B

Three lines are counterflow's: `enable`, `lay_out_chunks` around the builder of model chunks, and `find_data_rank`. Flags such
as ``--cf-schedule zbv`` go before what `enable` is given. ``--save`` and ``--load`` a folder to start two runs from the same
weights.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import counterflow

OPTIONS = {"schedule": "dualpipev", "eplb": True}
RANKS_PER_PIPELINE, LAYERS, VOCABULARY, SEQUENCE, MICROBATCHES = 2, 4, 64, 32, 8

Batch = dict[str, torch.Tensor]


def read_batches(data_rank: int, seed: int) -> Iterator[Batch]:
    """Yield micro-batches of two made-up sequences each: every token follows from the one before, most of the time."""
    draw = torch.Generator().manual_seed(1000 * seed + data_rank)
    while True:
        tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=draw)
        for place in range(1, SEQUENCE + 1):
            follows = torch.rand(2, generator=draw) < 0.8
            tokens[:, place] = torch.where(follows, (5 * tokens[:, place - 1] + 7) % VOCABULARY, tokens[:, place])
        positions = torch.arange(SEQUENCE).expand(2, -1)
        yield {"tokens": tokens[:, :-1].cuda(), "labels": tokens[:, 1:].contiguous().cuda(), "positions": positions.cuda()}


def make_config(chunks: int) -> Any:
    """Return the config of a small mixture-of-experts model for ``chunks`` model chunks per pipeline rank."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64, moe_ffn_hidden_size=32, num_moe_experts=8,
        moe_router_topk=2, moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall", add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0, pipeline_model_parallel_size=RANKS_PER_PIPELINE, expert_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None, pipeline_dtype=torch.float32,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        deallocate_pipeline_outputs=True, overlap_p2p_comm=chunks > 1, batch_p2p_comm=chunks == 1,
    )  # fmt: skip


def build_chunk(config: Any, vp_stage: int | None = None) -> Any:
    """Return one model chunk of this pipeline rank: its first and last stage are as ``parallel_state`` says."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    where = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    return GPTModel(
        config, get_gpt_layer_local_spec(num_experts=config.num_moe_experts), VOCABULARY, SEQUENCE, vp_stage=vp_stage,
        pre_process=parallel_state.is_pipeline_first_stage(**where), post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip


def build_model(config: Any, chunks: int) -> tuple[list[Any], Any]:
    """Return this rank's model chunks, each in Megatron's data parallelism, and their optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    build = counterflow.lay_out_chunks(partial(build_chunk, config))
    built = [build(vp_stage=stage if chunks > 1 else None) for stage in range(chunks)]
    model = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in built]
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=1.0), model)
    config.no_sync_func = [chunk.no_sync for chunk in model] if chunks > 1 else model[0].no_sync
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    return model, optimizer


def list_weights(model: list[Any]) -> dict[str, Any]:
    """Return what a checkpoint holds of this rank's chunks, under keys that name the model's layers, not the rank's."""
    named_by_layer = {"non_homogeneous_layers": True}
    return {f"chunk {index}": chunk.module.sharded_state_dict(metadata=named_by_layer) for index, chunk in enumerate(model)}


def forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through one chunk; what does not begin or end the model leaves tokens or labels alone."""
    batch = next(batches)
    output = chunk(batch["tokens"], batch["positions"], None, labels=batch["labels"])

    def compute_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return output, compute_loss


def train(given: argparse.Namespace) -> None:
    """Train and print each step's loss, on the last rank, to all its digits."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=RANKS_PER_PIPELINE, expert_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=given.chunks if given.chunks > 1 else None,
    )  # fmt: skip
    torch.manual_seed(given.seed)
    model_parallel_cuda_manual_seed(given.seed)
    config = make_config(given.chunks)
    model, optimizer = build_model(config, given.chunks)
    iterators = [read_batches(counterflow.find_data_rank(stage), given.seed) for stage in range(given.chunks)]
    if given.load is not None:
        state = dist_checkpointing.load(list_weights(model), str(given.load))
        for index, chunk in enumerate(model):
            chunk.module.load_state_dict(state[f"chunk {index}"])
    run = get_forward_backward_func()
    for step in range(1, given.steps + 1):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward_step, data_iterator=iterators, model=model, num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        if losses:  # on the last pipeline rank
            loss = torch.stack([one["loss"] for one in losses]).mean()
            dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
            loss /= parallel_state.get_data_parallel_world_size()
            if dist.get_rank() == dist.get_world_size() - 1:
                print(f"step {step}  loss {float(loss):.9g}  grad norm {float(norm):.9g}", flush=True)
    if given.save is not None:
        given.save.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(list_weights(model), str(given.save))


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="A loop over megatron-core under counterflow.")
    parser.add_argument("--plain", action="store_true", help="without the plugin, under Megatron's own 1F1B")
    parser.add_argument("--chunks", type=int, metavar="N", help="model chunks per pipeline rank (default: 2; with --plain 1)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="training steps (default: 10)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of weights and data (default: 1)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the weights at the end")
    parser.add_argument("--load", type=Path, metavar="DIR", help="start from these weights")
    given, _ = parser.parse_known_args(argv)  # the --cf flags are `enable`'s
    given.chunks = given.chunks or (1 if given.plain else 2)
    return given


def main() -> None:
    """Put the plugin in force and train."""
    given = read_arguments(sys.argv[1:])
    # Without options it only lets a machine without a GPU train on its CPU.
    counterflow.enable({} if given.plain else OPTIONS)
    dist.init_process_group("nccl")  # gloo where ranks run on the CPU
    train(given)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
