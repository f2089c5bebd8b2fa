"""A DeepSpeed script that knows nothing of Counterflow: it trains a small MoE model, sharded by AutoEP, with or without pipeline.

``deepspeed_experts_worker.py CASES.json OUT.json``: each case is a mapping of what `train` takes; rank 0 writes. Tests call
`run`, which can let placements change at every step.
"""

import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, TOKENS, BLOCKS, EXPERTS = 64, 16, 12, 6, 8


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * 2 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * WIDTH**-0.5)


class Mixture(nn.Module):
    """Looks like Mixtral's; AutoEP replaces it. The router prefers some experts: its first input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()
        with torch.no_grad():
            self.gate.weight[:, 0] = torch.linspace(1, -1, EXPERTS)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Mixture()
        with torch.no_grad():
            self.norm.bias[0] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(self.feed(self.norm(x)))


def compute_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.float().view(-1, VOCABULARY), labels.view(-1))


def list_layers(dense: int) -> list[LayerSpec]:
    """The first ``dense`` blocks have no experts."""
    blocks = [LayerSpec(Dense if index < dense else Block) for index in range(BLOCKS)]
    return [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *blocks, LayerSpec(nn.Linear, WIDTH, VOCABULARY)]


def build(layer: LayerSpec, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return layer.build()  # type: ignore[no-any-return]


class Plain(nn.Sequential):
    """The same model without a pipeline. ``recompute``: checkpointed with reentrance, or without."""

    recompute: bool | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self[0](tokens)
        for layer in self[1:-1]:
            x = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return self[-1](x)  # type: ignore[no-any-return]


def draw_batches(engine: Any, rank: int, replicas: int, length: int = TOKENS) -> Iterator[Any]:
    """Yield the micro-batches of this replica for ever."""
    size = engine.train_micro_batch_size_per_gpu()
    for number in count():
        generator = torch.Generator().manual_seed(number * replicas + rank)
        tokens = torch.randint(VOCABULARY, (size, length), generator=generator)
        yield tokens, (tokens * 5 + 3) % VOCABULARY


class PlainRun:
    """Steps of an engine without a pipeline."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.batches = draw_batches(engine, torch.distributed.get_rank(), torch.distributed.get_world_size())

    def train(self) -> float:
        losses = torch.zeros(())
        for _ in range(self.engine.gradient_accumulation_steps()):
            tokens, labels = next(self.batches)
            loss = compute_loss(self.engine(tokens), labels)
            self.engine.backward(loss)
            losses += loss.detach() / self.engine.gradient_accumulation_steps()
            self.engine.step()
        torch.distributed.all_reduce(losses)
        return float(losses) / torch.distributed.get_world_size()

    def evaluate(self) -> float:
        self.engine.eval()
        batches, losses = draw_batches(self.engine, torch.distributed.get_rank(), torch.distributed.get_world_size()), []
        with torch.no_grad():
            for _ in range(self.engine.gradient_accumulation_steps()):
                tokens, labels = next(batches)
                losses.append(compute_loss(self.engine(tokens), labels))
        loss = torch.stack(losses).mean()
        torch.distributed.all_reduce(loss)
        self.engine.train()
        return float(loss) / torch.distributed.get_world_size()


class PipelineRun:
    """Steps of an engine with a pipeline."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.batches = draw_batches(engine, engine.mpu.get_data_parallel_rank(), engine.dp_world_size)

    def train(self) -> float:
        return float(self.engine.train_batch(self.batches))

    def evaluate(self) -> float:
        return float(
            self.engine.eval_batch(draw_batches(self.engine, self.engine.mpu.get_data_parallel_rank(), self.engine.dp_world_size))
        )


def train(
    config: dict[str, Any],
    steps: int,
    seed: int,
    stages: int = 0,
    dense: int = 0,
    recompute: bool | None = None,
    save: str | None = None,
    load: dict[str, Any] | None = None,
    evaluate_at: int = 0,
) -> dict[str, Any]:
    """Train and evaluate; return the steps, an evaluation as one more.

    ``stages``: of the pipeline, 0 for none. ``load`` are arguments of ``load_checkpoint``; steps go on from there.
    """
    layers = list_layers(dense)
    # A layer's weights depend on its place alone, so that runs with and without a pipeline can be compared.
    if stages:
        how = {"seed_layers": True, "base_seed": seed, "partition_method": "uniform"}
        model: Any = PipelineModule(layers, num_stages=stages, loss_fn=compute_loss, **how)
    else:
        model = Plain(*(build(layer, seed + index) for index, layer in enumerate(layers)))
        model.recompute = recompute
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=[*model.parameters()])
    run = PipelineRun(engine) if stages else PlainRun(engine)
    done, first = [], 1
    if load is not None:
        engine.load_checkpoint(**load)
        first = engine.global_steps + 1
        for _ in range((first - 1) * engine.gradient_accumulation_steps()):
            next(run.batches)
    for step in range(first, steps + 1):
        loss = run.train()
        norm = engine.get_global_grad_norm()
        done.append({"iteration": step, "loss": loss, "grad_norm": float(norm if norm is not None else -1.0), "skipped": False})
        if step == evaluate_at:
            done.append({"iteration": 0, "loss": run.evaluate(), "skipped": False})
    done.append({"iteration": steps + 1, "loss": run.evaluate(), "skipped": False})
    if save is not None:
        engine.save_checkpoint(save)
    return {"steps": done, "error": None}


def scatter() -> None:
    """Let every step have another placement: plans are drawn, so are homes where they may move, and what micro-batches clone."""
    import numpy as np

    from counterflow.balance.placement import EMPTY, Placement
    from counterflow.moe import layer, planning
    from tests.support.drawn_loans import LoanDrawer

    drawn = np.random.default_rng(0)

    def plan(forecasts: Any, placement: Placement, microbatches: int, traffic_weight: float, costs: Any = None) -> Placement:
        bare = planning.clear_clones(placement)
        experts = bare.experts.copy()
        for row, slot in np.argwhere(experts == EMPTY):
            rank = slot // placement.cluster.slots_per_rank[0]
            on_rank = experts[row].reshape(placement.cluster.ranks, -1)[rank]
            others = [one for one in range(EXPERTS) if one not in on_rank]
            experts[row, slot] = drawn.choice([*others, EMPTY])
        return Placement(placement.cluster, experts, placement.homes)

    def exchange_homes(forecasts: Any, placement: Placement, horizon: int, *, traffic_weight: float = 0.0) -> Any:
        width, bare = placement.cluster.slots_per_rank[0], planning.clear_clones(placement)
        experts, homes = bare.experts.copy(), bare.homes.copy()  # type: ignore[union-attr]
        for row in range(len(experts)):
            slots = drawn.integers(homes.shape[1] // placement.cluster.ranks) + width * np.arange(2)
            homes[row, experts[row, slots]] = slots[::-1]
            experts[row, slots] = experts[row, slots[::-1]]
        return SimpleNamespace(placement=Placement(placement.cluster, experts, homes))

    planning.plan_next, planning.plan_homes = plan, exchange_homes
    layer.plan_exact = LoanDrawer(0)  # type: ignore[assignment]


def run(argument: list[str]) -> None:
    """Run this file as a script, under the launcher; ``argument`` are its own arguments, and "scatter" behind them if asked."""
    from counterflow.launch import main

    if argument[2:] == ["scatter"]:
        scatter()
    main([__file__, *argument[:2]])


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    results = {name: train(**case) for name, case in json.loads(Path(sys.argv[1]).read_text()).items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
