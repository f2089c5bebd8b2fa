"""How much of the expert all-to-all an overlapped pair hides: `python -m benchmarks.overlap [--ranks 2]`.

Real Megatron MoE layers, expert parallel over gloo, on the CPU platform. Attention and experts sleep in their forward, in
their input gradient and in their weight gradient; each all-to-all sleeps before it exchanges its tokens, so long that a
pair's all-to-alls take as long as its compute. The share hidden is 1 - (time - time with all-to-alls that do not sleep) / the
all-to-alls' sleep; all turn by turn in one run, medians.
"""

import argparse
import os
import socket
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

LAYERS, SECONDS = 4, 0.02
# Of a layer and a micro-batch: F, I and W, of attention and of the experts; two all-to-alls forward, two backward.
EXCHANGE_SECONDS = 6 * SECONDS / 4
MODES = ("without --cf-overlap", "--cf-overlap --no-cf-zero-bubble", "--cf-overlap")


class Sleep(torch.autograd.Function):
    """The identity, which takes its time in F, I and W."""

    splits = True

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Sleep for an F."""
        time.sleep(SECONDS)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Sleep for an I, and for a W now or, split, when the pair comes to it."""
        from counterflow.runtime.weight_grads import defer_weight_grad

        time.sleep(SECONDS)
        if Sleep.splits:
            defer_weight_grad(lambda: time.sleep(SECONDS))
        else:
            time.sleep(SECONDS)
        return grads[0]


class SlowExchange:
    """`all_to_all_single` whose tokens are ``seconds`` under way; the small tensors beside them are not."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._exchange = dist.all_to_all_single

    def __call__(self, output: torch.Tensor, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Sleep, then exchange."""
        if tokens.dim() == 2:
            time.sleep(self.seconds)
        return self._exchange(output, tokens, *args, **kwargs)


def build_model(ranks: int) -> Any:
    """Return a GPT-MoE model of ``LAYERS`` layers whose attention and experts sleep."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=32, num_attention_heads=2, ffn_hidden_size=32, num_moe_experts=2 * ranks,
        moe_router_topk=2, moe_token_dispatcher_type="alltoall", expert_model_parallel_size=ranks, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, overlap_moe_expert_parallel_comm=True,
    )  # fmt: skip
    model = GPTModel(config, get_gpt_layer_local_spec(num_experts=2 * ranks), 64, 32, position_embedding_type="rope")
    for parameter in model.bfloat16().parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    for layer in model.decoder.layers:
        for module in (layer.self_attention, layer.mlp.experts):
            module.register_forward_hook(lambda module, args, output: (Sleep.apply(output[0]), output[1]))
    return model


def run_forward(data: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """Megatron's forward step on random tokens."""
    tokens = torch.randint(0, 64, (1, 32))
    positions = torch.arange(32).unsqueeze(0)
    run = model.build_schedule_plan if return_schedule_plan else model
    return run(tokens, positions, None, labels=tokens), lambda output: (output.float().mean(), {})


def time_pairs(mode: str, model: Any, nodes: Any, exchange: SlowExchange, repeats: int) -> list[float]:
    """Return the median seconds of a pair, as the executor has it run in this mode: with quick and with slow all-to-alls."""
    from counterflow.megatron.pipeline.gradient_sync import GradientSync
    from counterflow.megatron.pipeline.overlap import OverlapWork
    from counterflow.megatron.pipeline.work import MegatronWork, Step
    from counterflow.schedule import ScheduleTable, lay_straight
    from counterflow.schedule.actions import Action, pair

    Sleep.splits = mode == MODES[2]
    pairs = [pair(Action("F", 0, m + 1), Action("B", 0, m)) for m in range(2 * repeats)]
    row = (Action("F", 0, 0), *pairs, Action("B", 0, 2 * repeats))
    table = ScheduleTable("pairs", lay_straight(1), 2 * repeats + 1, (row,))
    tokens = torch.zeros([], dtype=torch.int)
    step = Step(run_forward, [None], [model], model.config, table, table.microbatches, 1, False, False, None, [], tokens)
    sync = GradientSync(model.config, [model], table, 0, forward_only=False)
    work = MegatronWork(step, sync) if mode == MODES[0] else OverlapWork(step, sync, nodes)
    work.forward(0, 0, ())
    times: dict[float, list[float]] = {0.0: [], EXCHANGE_SECONDS: []}
    for action, exchange.seconds in zip(pairs, repeats * list(times), strict=True):
        f, b = action.parts
        dist.barrier()
        begun = time.perf_counter()
        if isinstance(work, OverlapWork):
            work.forward_backward(f, (), b, ())
        else:
            work.forward(f.stage, f.microbatch, ())
            work.backward(b.stage, b.microbatch, ())
        dist.barrier()
        times[exchange.seconds].append(time.perf_counter() - begun)
    exchange.seconds = 0.0
    work.backward(0, 2 * repeats, ())
    return [statistics.median(some) for some in times.values()]


def measure(rank: int, ranks: int, port: int, repeats: int) -> None:
    """Run one rank; rank 0 prints."""
    from counterflow.platform import install_cpu

    patches = install_cpu()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from counterflow.megatron import seams
    from counterflow.megatron.install import take_seams
    from counterflow.megatron.pipeline.overlap import PairNodes

    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(rank)
    nodes = PairNodes()
    take_seams(patches, [seams.OVERLAP], SimpleNamespace(pairs=nodes))
    exchange = SlowExchange()
    patches.set(dist, "all_to_all_single", exchange)
    model = build_model(ranks)
    for mode in MODES:
        time_pairs(mode, model, nodes, exchange, 1)  # warms up
    under_way = 4 * LAYERS * EXCHANGE_SECONDS
    if rank == 0:
        print(f"{ranks} ranks, {LAYERS} MoE layers; a pair computes {1e3 * 6 * LAYERS * SECONDS:.0f} ms, its "
              f"{4 * LAYERS} all-to-alls take {1e3 * under_way:.0f} ms; medians of {repeats}", flush=True)  # fmt: skip
    for mode in MODES:
        quick, slow = time_pairs(mode, model, nodes, exchange, repeats)
        if rank == 0:
            hidden = 100 * (1 - (slow - quick) / under_way)
            print(f"  {mode:<34} {1e3 * quick:5.0f} ms, with them {1e3 * slow:5.0f} ms: {hidden:5.1f} % hidden", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="expert-parallel ranks (default: 2)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs per median (default: 7)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(measure, (args.ranks, port, args.repeats), nprocs=args.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
