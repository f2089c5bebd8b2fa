"""A DeepSpeed script that knows nothing of Counterflow: it trains a small model in a pipeline and writes losses and norms.

``deepspeed_worker.py MODEL CONFIG.json STEPS SEED OUT.json``; one of the four ranks writes.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

VOCABULARY, WIDTH, TOKENS, BLOCKS = 64, 16, 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class MaskedBlock(Block):
    """Takes and returns a tuple: activations, a float mask without gradient, a truth mask."""

    def forward(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, mask, allowed = given
        return super().forward(x * mask) * allowed.unsqueeze(-1), mask, allowed


class Masks(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = (tokens % 3 != 0).to(self.weight.dtype).unsqueeze(-1)
        return super().forward(tokens), mask, tokens % 5 != 0


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
    if model == "tuple":
        blocks = [LayerSpec(MaskedBlock) for _ in range(BLOCKS - 2)]
        return [LayerSpec(Masks, VOCABULARY, WIDTH), *blocks, LayerSpec(First), head]
    return [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(Block) for _ in range(BLOCKS - 2)), head]


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(index))
        return text[:-1], text[1:]


def train(model: str, config: dict[str, object], steps: int, seed: int, stages: int) -> dict[str, object]:
    torch.manual_seed(seed)
    if stages == 1:
        deepspeed.init_distributed("gloo")
    module = PipelineModule(list_layers(model), num_stages=stages, loss_fn=compute_loss, partition_method="parameters")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, training_data=Samples(), config=config)
    losses, norms = [], []
    for _ in range(steps):
        losses.append(engine.train_batch().item())
        norms.append(float(engine.get_global_grad_norm() or 0))
    loader = iter(deepspeed.utils.RepeatingLoader(engine.deepspeed_io(Samples())))
    return {"losses": losses, "norms": norms, "evaluation": engine.eval_batch(loader).item()}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        results[name] = train(case["model"], case["config"], case["steps"], case["seed"], case["stages"])
        print(name, results[name], flush=True) if torch.distributed.get_rank() == 0 else None
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
