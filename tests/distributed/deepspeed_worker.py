"""A DeepSpeed script that knows nothing of Counterflow: it trains a small model in a pipeline and writes losses and norms.

``deepspeed_worker.py CASES.json OUT.json``: each case is a mapping of what `train` takes; rank 0 writes.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

VOCABULARY, WIDTH, TOKENS, BLOCKS = 64, 16, 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Mixer(Block):
    """Mixes the places of a sequence too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.mix(x.transpose(1, 2)).transpose(1, 2))


class MaskedBlock(Block):
    """Takes and returns a tuple: activations, a mask of floats or integers without gradient, a truth mask."""

    def forward(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, mask, allowed = given
        return super().forward(x * mask) * allowed.unsqueeze(-1), mask, allowed


class Masks(nn.Embedding):
    dtype = torch.int64

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = (tokens % 3 != 0).to(self.dtype).unsqueeze(-1)
        return super().forward(tokens), mask, tokens % 5 != 0


class FloatMasks(Masks):
    dtype = torch.float32


class First(nn.Module):
    def forward(self, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return given[0]


def read_out(embedding: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, embedding.weight)


def compute_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.float().view(-1, VOCABULARY), labels.view(-1))


def list_layers(model: str) -> list[object]:
    if model == "tied":
        ends = [TiedLayerSpec("words", nn.Embedding, VOCABULARY, WIDTH, forward_fn=forward) for forward in (None, read_out)]
        return [ends[0], *(LayerSpec(Block) for _ in range(BLOCKS - 2)), ends[1]]
    head = LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    if model in ("tuple", "floats", "shapes"):
        blocks = [LayerSpec(MaskedBlock) for _ in range(BLOCKS - 2)]
        return [LayerSpec(FloatMasks if model == "floats" else Masks, VOCABULARY, WIDTH), *blocks, LayerSpec(First), head]
    block = Mixer if model == "mixed" else Block
    return [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(block) for _ in range(BLOCKS - 2)), head]


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """``run``: how many samples that follow each other have the same length; 0 for all."""

    def __init__(self, run: int = 0, length: int = TOKENS) -> None:
        self.run, self.length = run, length

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.length - index // self.run % 3 if self.run else self.length
        tokens = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(index))
        return tokens, (tokens * 5 + 3) % VOCABULARY


def draw_batches(samples: Samples, engine: Any) -> Iterator[Any]:
    """Yield the micro-batches of this replica for ever."""
    size, replicas = engine.train_micro_batch_size_per_gpu(), engine.dp_world_size
    for first in count(engine.mpu.get_data_parallel_rank(), size * replicas):
        drawn = [samples[index % len(samples)] for index in range(first, first + size * replicas, replicas)]
        yield tuple(torch.stack(parts) for parts in zip(*drawn, strict=True))


def die(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield one micro-batch, then die in the middle of the step."""
    yield next(batches)
    os.kill(os.getpid(), signal.SIGKILL)


def make_optimizer(module: PipelineModule) -> torch.optim.Optimizer:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith("0."))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices, vectors = ([one for one in trained if (one.dim() > 1) == is_matrix] for is_matrix in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "lr": 0.0}], lr=1e-2)


def train(
    model: str,
    config: dict[str, Any],
    steps: int,
    seed: int,
    stages: int = 2,
    is_seeded: bool = False,
    has_loader: bool = False,
    has_groups: bool = False,
    is_v: bool = False,
    slices: int = 1,
    recomputed: list[str] | None = None,
    save: str | None = None,
    save_at: int = 0,
    kill: list[int] | None = None,
    load: dict[str, Any] | None = None,
    has_cut: bool = False,
) -> dict[str, Any]:
    """Train and evaluate; return the steps, the evaluation as one more.

    ``has_loader``: the engine draws the samples itself. ``has_groups``: the script freezes the first layer and makes the
    optimizer, with two groups of parameters. ``is_v``: upstream has cut the model into a V already. ``slices`` ranks compute the
    same. ``recomputed`` names the only classes of layers that are recomputed. The state is saved to the folder ``save`` in the
    end, or after step ``save_at``. ``kill`` is a rank, and the step in which it dies. ``load`` are arguments of
    ``load_checkpoint``; steps go on from there. ``has_cut``: one more step follows, on shorter sequences.
    """
    if "fp16" in config:
        # torch computes it on any CPU; DeepSpeed asks whether the CPU has instructions for it.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(seed)
    # Where models of different numbers of stages are compared, a layer's weights depend on its place alone.
    # (Upstream seeds only with plain integers, which the method "parameters" does not give.)
    how: dict[str, Any] = {"checkpointable_layers": recomputed}
    if is_seeded:
        how |= {"seed_layers": True, "base_seed": seed, "partition_method": "uniform"}
    made = DualPipeVModule if is_v else PipelineModule
    is_dynamic = model == "shapes"
    if slices > 1:
        replicas = torch.distributed.get_world_size() // stages // slices
        how["topology"] = PipeModelDataParallelTopology(stages, slices, replicas)
    module = made(list_layers(model), num_stages=stages, loss_fn=compute_loss, dynamic_shape=is_dynamic, **how)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    given: dict[str, Any] = {"model_parameters": parameters}
    if has_groups:
        given = {"optimizer": make_optimizer(module)}
    samples = Samples(run=4 if is_dynamic or model == "changing" else 0)
    data = {"training_data": samples} if has_loader else {}
    engine, *_ = deepspeed.initialize(model=module, config=config, **given, **data)
    batches, done = None if has_loader else draw_batches(samples, engine), []
    if has_loader:
        # Says nothing in a pipeline, where the step itself says when gradients are reduced.
        engine.set_gradient_accumulation_boundary(False)
    first = 1
    if load is not None:
        engine.load_checkpoint(**load)
        first = engine.global_steps + 1
        for _ in range((first - 1) * engine.gradient_accumulation_steps()):
            next(batches)
    for step in range(first, steps + 1):
        if kill is not None and kill == [torch.distributed.get_rank(), step]:
            batches = die(batches)
        loss = engine.train_batch(batches).item()
        # Plain DeepSpeed at ZeRO-0 in fp32 has no norm.
        norm, skipped = engine.get_global_grad_norm(), engine.skipped_steps - sum(one["skipped"] for one in done)
        numbers = {"loss": loss} if norm is None else {"loss": loss, "grad_norm": float(norm)}
        done.append({"iteration": step, **numbers, "skipped": bool(skipped)})
        if save is not None and step == save_at:
            engine.save_checkpoint(save)
    loss = engine.eval_batch(draw_batches(samples, engine)).item()
    done.append({"iteration": steps + 1, "loss": loss, "skipped": False})
    if save is not None and not save_at:
        engine.save_checkpoint(save)
    if has_cut:
        engine.reset_activation_shape()
        loss = engine.train_batch(draw_batches(Samples(length=TOKENS - 4), engine)).item()
        done.append({"iteration": steps + 2, "loss": loss, "skipped": False})
        engine.reset_activation_shape()
    # With a monitor, upstream takes what is returned for one number.
    replicas = evaluate_apart(engine, samples) if steps and "csv_monitor" not in config else []
    return {"steps": done, "error": None, "replicas": replicas}


def evaluate_apart(engine: Any, samples: Samples) -> list[list[float]]:
    """Return, of each replica, its loss of the last step, and of a few micro-batches their losses and the last one's logits."""
    # Upstream's V takes no fewer than two for each rank.
    how: dict[str, Any] = {"reduce_output": None, "bcast_loss": False, "num_micro_batches": 2 * engine.num_stages}
    losses, logits = engine.eval_batch(draw_batches(samples, engine), return_logits=True, **how)
    mine = None
    if "counterflow" in engine._config._param_dict and not samples.run:
        # Plain DeepSpeed ends in an error here after a training step. And it adds up logits, which have to be of one shape.
        alone = engine.eval_batch(draw_batches(samples, engine), compute_loss=False, **how)
        assert losses is None or torch.equal(alone[-1], logits), "without a loss an evaluation returns the logits"
    if losses is not None:
        # On the rank of the last stage alone.
        sizes = logits.float().abs().sum().item(), logits.float().std().item()
        mine = engine.dp_group_loss.item(), *(loss.item() for loss in losses), *sizes
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (engine.mpu.get_data_parallel_rank(), mine))
    return [values for _, values in sorted((one for one in found if one[1] is not None), key=lambda one: one[0])]


def run(argument: list[str]) -> None:
    """Run this file as a script, under the launcher; ``argument`` are its own arguments."""
    from counterflow.launch import main

    main([__file__, *argument])


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    results = {name: train(**case) for name, case in json.loads(Path(sys.argv[1]).read_text()).items()}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
