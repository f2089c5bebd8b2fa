"""A made-up trainer: a small mixture-of-experts model of plain torch modules, and a loop that trains it in one process.

It knows nothing of Counterflow, and Counterflow nothing of it. `adapter.py` is what lies between.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

VOCABULARY, WIDTH, EXPERTS, TOP_K, TOKENS, STAGES = 64, 16, 8, 2, 64, 4
MICROBATCHES, REPLICAS, LEARNING_RATE = 8, 2, 0.05


class MoE(nn.Module):
    """A layer of experts, those of this rank of ``group`` or all of them; each token goes to TOP_K."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )
        self.group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``, ``[tokens, width]``, and what its experts make of it."""
        scores = self.router(x).softmax(-1)
        routed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(TOP_K).indices, True)
        return x + self.run_experts(x, scores, routed)

    def run_experts(self, x: torch.Tensor, scores: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """Return the sum of the experts' outputs for each token, by its scores, ``[tokens, experts]``."""
        return dispatch(x, scores, routed, list(self.experts), self.group)


def dispatch(
    x: torch.Tensor, scores: torch.Tensor, routed: torch.Tensor, experts: Sequence[nn.Module], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Send tokens to the ranks of their experts, run this rank's ``experts``, and add up what comes back.

    The columns of ``scores`` and ``routed`` are the experts of all ranks of ``group``, as many of each.
    """
    expert, token = routed.t().nonzero(as_tuple=True)
    counts = routed.sum(0)
    if group is None:
        made = _run_each(x[token], counts, experts)
    else:
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=group)
        sent, received = (some.view(group.size(), -1).sum(1).tolist() for some in (counts, theirs))
        made = _run_each(_Exchange.apply(x[token], sent, received, group), theirs, [*experts] * group.size())
        made = _Exchange.apply(made, received, sent, group)
    return torch.zeros_like(x).index_add(0, token, made * scores[token, expert, None])


def _run_each(rows: torch.Tensor, counts: torch.Tensor, experts: Sequence[nn.Module]) -> torch.Tensor:
    pieces = torch.split(rows, counts.tolist())
    return torch.cat([expert(piece) for expert, piece in zip(experts, pieces, strict=True)])


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, ``sent`` to each and ``received`` from each; its backward is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        """Return the rows that arrive."""
        ctx.way_back = received, sent, group
        arrived = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return the gradients of the rows that were sent."""
        return _Exchange.apply(gradients[0], *ctx.way_back), None, None, None


def build_model(seed: int) -> list[nn.Sequential]:
    """Return the stages of the model: an embedding before the first MoE layer, the output layer behind the last."""
    torch.manual_seed(seed)
    stages = [nn.Sequential(MoE()) for _ in range(STAGES)]
    stages[0].insert(0, nn.Embedding(VOCABULARY, WIDTH))
    stages[-1].append(nn.Linear(WIDTH, VOCABULARY))
    return [stage.double() for stage in stages]


def draw_batch(seed: int, step: int, replica: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and the tokens that follow them; some are frequent, so some experts are hot."""
    generator = torch.Generator().manual_seed(((seed * 100 + step) * 10 + replica) * 100 + microbatch)
    text = (torch.rand(TOKENS + 1, generator=generator) ** 3 * VOCABULARY).long()
    return text[:-1], text[1:]


def compute_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a micro-batch's share of the step's loss, the mean over all micro-batches of all replicas."""
    return nn.functional.cross_entropy(output, targets) / (MICROBATCHES * REPLICAS)


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the trainer's optimizer."""
    return torch.optim.Adam(parameters, LEARNING_RATE)


def train_plain(seed: int, steps: int) -> list[float]:
    """Train in this process, no pipeline and no clones; return the loss of each step."""
    model = nn.Sequential(*build_model(seed))
    optimizer, losses = make_optimizer(list(model.parameters())), []
    for step in range(1, steps + 1):
        losses.append(0.0)
        for replica in range(REPLICAS):
            for microbatch in range(MICROBATCHES):
                tokens, targets = draw_batch(seed, step, replica, microbatch)
                loss = compute_loss(model(tokens), targets)
                loss.backward()  # type: ignore[no-untyped-call]
                losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses
