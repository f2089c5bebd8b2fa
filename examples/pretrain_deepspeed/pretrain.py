"""A DeepSpeed training script: a small transformer on the bytes of a text, as a PipelineModule, with experts if asked.

It knows nothing of counterflow: run it alone, or with the plugin on by ``torchrun … -m counterflow.launch pretrain.py …``, where
the key "counterflow" of its config names a schedule. `train.py` beside it starts it on this machine.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

BYTES, WIDTH, HEADS, BLOCKS, LENGTH = 256, 128, 4, 6, 128
CHOSEN = 2  # experts of a byte
VALIDATION_PART = 20  # one in so many bytes, the last ones, is not trained on


class Words(nn.Embedding):
    """Bytes as vectors, and vectors as logits of bytes."""

    def reset_parameters(self) -> None:
        """Draw small weights, since they read out too."""
        nn.init.normal_(self.weight, std=0.02)


class Places(nn.Module):
    """Adds where in its piece a byte stands."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [batch, length, width] with the places' vectors added."""
        return x + self.places[: x.shape[1]]


class Experts(nn.Module):
    """The weights of all experts of a layer, each a gated feed-forward network."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 4 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, WIDTH, 2 * WIDTH) * (2 * WIDTH) ** -0.5)

    def run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return what one expert makes of x [rows, width]."""
        gate, up = nn.functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[expert])


class Mixture(nn.Module):
    """A mixture of experts, named and stored as Mixtral's: DeepSpeed's AutoEP replaces it by one that shards the experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, count, bias=False), Experts(count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [batch, length, width] after the experts of each byte, all of them on this rank."""
        scores, chosen = nn.functional.softmax(self.gate(x).float(), dim=-1).topk(CHOSEN)
        scores, result = scores / scores.sum(-1, keepdim=True), torch.zeros_like(x)
        for expert in range(self.gate.out_features):
            *place, order = (chosen == expert).nonzero(as_tuple=True)
            weights = scores[(*place, order)].unsqueeze(-1).to(x.dtype)
            result = result.index_put(tuple(place), self.experts.run(expert, x[tuple(place)]) * weights, accumulate=True)
        return result


class Block(nn.Module):
    """Attention and a feed-forward network or a mixture of experts, each beside a residual."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm, self.mix, self.join = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.before = nn.LayerNorm(WIDTH)
        dense = (nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.mlp = Mixture(experts) if experts else nn.Sequential(*dense)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [batch, length, width] with what the layer adds."""
        queries, keys, values = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.mix(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.join(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before(x))  # type: ignore[no-any-return]


def read_out(words: Words, x: torch.Tensor) -> torch.Tensor:
    """Return logits by the weights of the embedding."""
    return nn.functional.linear(x, words.weight)


def compute_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build_model(stages: int, experts: int) -> PipelineModule:
    """Return the model, whose first and last layer share their weights."""
    first, last = (TiedLayerSpec("words", Words, BYTES, WIDTH, forward_fn=forward) for forward in (None, read_out))
    layers = [first, LayerSpec(Places), *(LayerSpec(Block, experts) for _ in range(BLOCKS)), LayerSpec(nn.LayerNorm, WIDTH), last]
    return PipelineModule(layers, num_stages=stages, loss_fn=compute_loss, partition_method="parameters")


def draw(text: torch.Tensor, engine: Any, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this replica's micro-batches of a step: pieces of the text from places that the step's number decides."""
    size, replicas = engine.train_micro_batch_size_per_gpu(), engine.dp_world_size
    places = torch.Generator().manual_seed(step)
    for _ in range(engine.gradient_accumulation_steps()):
        starts = torch.randint(len(text) - LENGTH, (replicas, size), generator=places)[engine.mpu.get_data_parallel_rank()]
        pieces = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).long()
        yield pieces[:, :-1], pieces[:, 1:]


def parse_arguments() -> argparse.Namespace:
    """Return the script's options; DeepSpeed adds its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a file to learn from")
    parser.add_argument("--save", type=Path, required=True, help="checkpoints; an earlier one is resumed")
    parser.add_argument("--steps", type=int, required=True, help="train up to this step")
    parser.add_argument("--stages", type=int, default=2, help="pipeline ranks (default: 2)")
    parser.add_argument("--experts", type=int, default=0, help="experts of a layer, 0 for a dense model (default: 0)")
    parser.add_argument("--save-interval", type=int, default=50, help="steps between checkpoints (default: 50)")
    parser.add_argument("--eval-interval", type=int, default=25, help="steps between validations (default: 25)")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help="given by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()  # type: ignore[no-any-return]


def train(options: argparse.Namespace) -> None:
    """Train from the last checkpoint up to ``--steps``."""
    torch.manual_seed(1234)
    model = build_model(options.stages, options.experts)
    engine, *_ = deepspeed.initialize(args=options, model=model, model_parameters=[*model.parameters()])
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8)
    held_back = len(text) // VALIDATION_PART
    learned, validation = text[:-held_back], text[-held_back:]
    if (options.save / "latest").exists():
        engine.load_checkpoint(str(options.save))
    speaks = torch.distributed.get_rank() == 0

    def say(words: str) -> None:
        if speaks:
            print(words, flush=True)

    def validate() -> None:
        loss = engine.eval_batch(draw(validation, engine, 0)).item()
        say(f"step {engine.global_steps:>4}: validation loss {loss:.4f}")

    validate()
    while engine.global_steps < options.steps:
        began = time.perf_counter()
        loss = engine.train_batch(draw(learned, engine, engine.global_steps + 1)).item()
        seconds = time.perf_counter() - began
        step, tokens = engine.global_steps, engine.train_batch_size() * LENGTH
        norm = float(engine.get_global_grad_norm())
        say(f"step {step:>4}/{options.steps}  loss {loss:.4f}  grad norm {norm:.3f}  {tokens / seconds:,.0f} tokens/s")
        if step % options.eval_interval == 0 or step == options.steps:
            validate()
        if step % options.save_interval == 0 or step == options.steps:
            engine.save_checkpoint(str(options.save))


if __name__ == "__main__":
    # Where DeepSpeed runs on the CPU it would compile a collective of its own first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    train(parse_arguments())
