"""A DeepSpeed script that trains a pipeline of Transformer Engine's layers, in BF16 or FP8, over the CPU platform's stand-in.

``deepspeed_engine_worker.py CASES.json OUT.json``: each case is a mapping of what `train` takes; rank 0 writes.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from counterflow.patching import Patches
from counterflow.platform import cpu, engine
from counterflow.trainer import splits

engine.install(cpu.install())

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.common import recipe as recipes  # noqa: E402
from transformer_engine.pytorch.module import base  # noqa: E402

VOCABULARY, WIDTH, TOKENS, BLOCKS, MICROBATCHES = 64, 32, 16, 6, 4
RECIPES: dict[str, Any] = {
    # Its largest values are of one rank: a pipeline's ranks would wait for each other in every layer.
    "delayed": lambda: recipes.DelayedScaling(reduce_amax=False),
    "tensorwise": recipes.Float8CurrentScaling,
    "blockwise": recipes.Float8BlockScaling,
}
# How many weights were quantized, and how many gradients were left to a W.
work: Counter[str] = Counter()


class Block(nn.Module):
    """Linears of all kinds; their weights are quantized at the first micro-batch of a step."""

    def __init__(self, recipe: str | None) -> None:
        super().__init__()
        self.recipe = RECIPES[recipe]() if recipe else None
        self.up, self.down = te.LayerNormLinear(WIDTH, 2 * WIDTH), te.Linear(2 * WIDTH, WIDTH, bias=False)
        self.grouped = te.GroupedLinear(2, WIDTH, WIDTH)
        self.mlp = te.LayerNormMLP(WIDTH, 2 * WIDTH, bias=False)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = None
        if self.training:
            first, self.seen = self.seen % MICROBATCHES == 0, self.seen + 1
        with te.autocast(enabled=self.recipe is not None, recipe=self.recipe):
            x = x + self.down(nn.functional.silu(self.up(x, is_first_microbatch=first)), is_first_microbatch=first)
            rows = x.reshape(-1, WIDTH)
            half = len(rows) // 2
            x = x + self.grouped(rows, [half, len(rows) - half], is_first_microbatch=first).view_as(x)
            return x + self.mlp(x, is_first_microbatch=first)  # type: ignore[no-any-return]


def count_weights(quantize_weight: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        work["weights"] += kwargs.get("workspace") is None or bool(kwargs.get("update_workspace", True))
        return quantize_weight(*args, **kwargs)

    return run


def count_left(leave: Any) -> Any:
    def run(*args: Any) -> None:
        work["left"] += 1
        leave(*args)

    return run


Patches().replace(base, "quantize_weight", count_weights)
Patches().replace(splits, "leave", count_left)


def compute_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.float().view(-1, VOCABULARY), labels.view(-1))


def draw_batches(engine: Any) -> Iterator[Any]:
    rank, size = engine.mpu.get_data_parallel_rank(), engine.train_micro_batch_size_per_gpu()
    for number in count():
        generator = torch.Generator().manual_seed(number * engine.dp_world_size + rank)
        tokens = torch.randint(VOCABULARY, (size, TOKENS), generator=generator)
        yield tokens, (tokens * 5 + 3) % VOCABULARY


def train(config: dict[str, Any], recipe: str | None, steps: int, seed: int) -> dict[str, Any]:
    """Train; return the steps, and what all ranks did."""
    torch.manual_seed(seed)
    layers = [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(Block, recipe) for _ in range(BLOCKS))]
    head = LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    module = PipelineModule([*layers, head], num_stages=2, loss_fn=compute_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=[*module.parameters()])
    batches, done = draw_batches(engine), []
    work.clear()
    for step in range(1, steps + 1):
        loss = engine.train_batch(batches).item()
        done.append({"iteration": step, "loss": loss, "grad_norm": float(engine.get_global_grad_norm()), "skipped": False})
    works: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(works, work)
    return {"steps": done, "error": None, "work": dict(sum(works, Counter()))}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    results = {name: train(**case) for name, case in json.loads(Path(sys.argv[1]).read_text()).items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
