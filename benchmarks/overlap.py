"""How much of the expert all-to-all an overlapped pair hides: `python -m benchmarks.overlap [--ranks 2]`.

Real Megatron MoE layers, expert parallel over gloo, on the CPU platform. Attention and experts sleep in their forward, in
their input gradient and in their weight gradient. The link is emulated: it carries one all-to-all at a time, each as long as
0.8 of its layer's computation. The share hidden is 1 - (time - time with all-to-alls that take no time) / the all-to-alls' time;
all turn by turn in one run, the median of some pairs. A pair takes at least as long as its compute and as its all-to-alls: so
much a perfect interleaving could hide at best.
"""

import argparse
import os
import socket
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

LAYERS, SECONDS = 4, 0.02
# Of a layer and a micro-batch: F, I and W, of attention and of the experts; two all-to-alls forward, two backward.
LAYER_SECONDS = 6 * SECONDS / 4
LENGTHS = (0.8, 1.0)
MODES = ("F and B one after the other", "Megatron's plans", "hand-over --no-cf-zero-bubble", "hand-over")


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


class Link:
    """`all_to_all_single` over an emulated link: each exchange of tokens keeps it for ``seconds``, one after the other."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._free = 0.0
        self._exchange = dist.all_to_all_single

    def __call__(self, output: torch.Tensor, tokens: torch.Tensor, async_op: bool = False, **kwargs: Any) -> Any:
        """Exchange; the small tensors beside the tokens take no time."""
        if tokens.dim() == 2:
            self._free = max(self._free, time.perf_counter()) + self.seconds
        transfer = _Transfer(self._exchange(output, tokens, async_op=True, **kwargs), self._free)
        return transfer if async_op else transfer.wait()


class _Transfer:
    """A transfer that arrives at a time."""

    def __init__(self, work: Any, arrives: float) -> None:
        self._work, self._arrives = work, arrives

    def wait(self) -> None:
        """Wait until it has arrived."""
        time.sleep(max(0.0, self._arrives - time.perf_counter()))
        self._work.wait()


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


class Pairs:
    """Runs forwards, backwards and pairs of them in one of the modes."""

    def __init__(self, mode: str, model: Any, count: int) -> None:
        from benchmarks.plans import Plans
        from counterflow.megatron.pipeline.gradient_sync import GradientSync
        from counterflow.megatron.pipeline.overlap import list_carried
        from counterflow.megatron.pipeline.work import MegatronWork, Step
        from counterflow.runtime.handover import HandOver
        from counterflow.schedule import ScheduleTable, lay_straight
        from counterflow.schedule.actions import Action

        self.mode, self._action = mode, Action
        Sleep.splits = mode in (MODES[1], MODES[3])
        row = (*(Action("F", 0, m) for m in range(count)), *(Action("B", 0, m) for m in range(count)))
        table = ScheduleTable("pairs", lay_straight(1), count, (row,))
        tokens = torch.zeros([], dtype=torch.int)
        step = Step(run_forward, [None], [model], model.config, table, count, 1, False, False, None, [], tokens)
        self._work = MegatronWork(step, GradientSync(model.config, [model], table, 0, forward_only=False))
        self._plans = Plans(model, run_forward, count)
        self._handover = HandOver(list_carried())

    def run(self, forward: int | None, backward: int | None) -> None:
        """Run the F and the B of these micro-batches."""
        f, b = self._action("F", 0, forward or 0), self._action("B", 0, backward or 0)
        if self.mode == MODES[1]:
            self._plans.run(forward=forward is not None, backward=backward is not None)
        elif forward is None or backward is None or self.mode == MODES[0]:
            if forward is not None:
                self._work.forward(0, forward, ())
            if backward is not None:
                self._work.backward(0, backward, ())
        else:
            run_f, run_b = partial(self._work.forward, 0, forward, ()), partial(self._work.backward, 0, backward, ())
            self._handover.run_pair(f, run_f, b, run_b)


def time_pairs(mode: str, model: Any, link: Link, repeats: int, length: float) -> list[float]:
    """Return the median seconds of a pair, as it runs in this mode: with all-to-alls that take no time and as long as given."""
    pairs = Pairs(mode, model, 2 * repeats + 1)
    pairs.run(0, None)
    times: dict[float, list[float]] = {0.0: [], length: []}
    for number, link.seconds in enumerate(repeats * list(times)):
        dist.barrier()
        begun = time.perf_counter()
        pairs.run(number + 1, number)
        dist.barrier()
        times[link.seconds].append(time.perf_counter() - begun)
    link.seconds = 0.0
    pairs.run(None, 2 * repeats)
    return [statistics.median(some) for some in times.values()]


def measure(rank: int, ranks: int, port: int, repeats: int) -> None:
    """Run one rank; rank 0 prints."""
    from counterflow.platform import install_cpu

    patches = install_cpu()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from benchmarks.plans import hold_weight_grads_in_nodes
    from counterflow.megatron import seams
    from counterflow.megatron.install import take_seams

    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(rank)
    link = Link()
    patches.set(dist, "all_to_all_single", link)
    take_seams(patches, [seams.OVERLAP])
    hold_weight_grads_in_nodes(patches)
    model = build_model(ranks)
    for mode in MODES:
        time_pairs(mode, model, link, 1, 0.001)  # warms up
    for share in LENGTHS:
        length = share * LAYER_SECONDS
        if rank == 0:
            describe(ranks, repeats, share)
        for mode in MODES:
            quick, slow = time_pairs(mode, model, link, repeats, length)
            if rank == 0:
                hidden = 100 * (1 - (slow - quick) / (4 * LAYERS * length))
                print(f"  {mode:<30} {1e3 * quick:5.0f} ms, with them {1e3 * slow:5.0f} ms: {hidden:5.1f} % hidden", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def describe(ranks: int, repeats: int, share: float) -> None:
    """Print what is compared."""
    travel, compute = 4 * LAYERS * share * LAYER_SECONDS, 6 * LAYERS * SECONDS
    best = 100 * min(1, compute / travel)
    print(
        f"{ranks} ranks, {LAYERS} MoE layers; a pair computes {1e3 * compute:.0f} ms, its {4 * LAYERS} all-to-alls take "
        f"{1e3 * travel:.0f} ms ({share:g} of it); the median of {repeats}; at best {best:.0f} % can be hidden",
        flush=True,
    )


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="expert-parallel ranks (default: 2)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of each kind (default: 7)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(measure, (args.ranks, port, args.repeats), nprocs=args.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
