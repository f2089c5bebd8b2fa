"""Counterflow in a made-up trainer: its model in a pipeline of two ranks and over two expert-parallel ones, hot experts cloned.

``torchrun --nproc-per-node 4 adapter.py OUT.json STEPS SEED…`` trains once for each seed and writes what happened.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import trainer
from torch import nn
from trainer import MoE

from counterflow import Options
from counterflow.moe.clones import LayerExperts
from counterflow.moe.gradients import PlainGradients
from counterflow.moe.layer import LayerSlots
from counterflow.moe.planning import compile_planner
from counterflow.runtime.executor import Work
from counterflow.runtime.messages import Member, Message, run_backward
from counterflow.trainer.balanced_layers import BalancedLayers, ExpertGroups
from counterflow.trainer.balancing_log import end_step
from counterflow.trainer.pipeline import Pipeline

FORM = (Member((trainer.TOKENS, trainer.WIDTH), torch.float64),)


class Slots(LayerSlots):
    """This rank's experts of a MoE layer, and its clones, which are no children of the layer: no optimizer knows of them."""

    def __init__(self, moe: MoE, number: int, group: dist.ProcessGroup, options: Options) -> None:
        own, clones = trainer.EXPERTS // group.size(), options.eplb_clones_per_rank
        super().__init__(own, clones, group, np.arange(group.size()), is_exact=options.eplb_split == "exact")
        self.number, self.group = number, group
        moe.experts = moe.experts[own * group.rank() : own * (group.rank() + 1)]
        self.homes, self.clones = list(moe.experts), [copy.deepcopy(moe.experts[0]) for _ in range(clones)]
        moe.run_experts = self.run_experts  # type: ignore[method-assign]

    def list_experts(self) -> LayerExperts:
        """Return the parameters of homes and clones."""
        return LayerExperts([list(e.parameters()) for e in self.homes], [list(e.parameters()) for e in self.clones])

    def run_experts(self, x: torch.Tensor, scores: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """Run the trainer's own dispatcher, over slots in place of experts."""
        slot_scores, slots, _ = self.deal(scores, routed)
        self.finish_refresh()
        return trainer.dispatch(x, slot_scores, slots, [*self.homes, *self.clones], self.group)


class Stages(Work):
    """The forwards and backwards of this rank's stages in one step."""

    def __init__(self, stages: dict[int, nn.Module], batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.stages, self.batches, self.loss = stages, batches, torch.zeros((), dtype=torch.float64)
        self.graphs: dict[tuple[int, int], tuple[Message, Message]] = {}

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the stage's output, the loss on the last."""
        tokens, targets = self.batches[microbatch]
        output = self.stages[stage](*(received or (tokens,)))
        if stage == trainer.STAGES - 1:
            output = trainer.compute_loss(output, targets)
            self.loss += output.detach()
        self.graphs[stage, microbatch] = received, (output,)
        return (output,)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the gradient of the stage's input."""
        return run_backward(*self.graphs.pop((stage, microbatch)), received)


def find_group(groups: list[list[int]]) -> dist.ProcessGroup:
    """Open groups of these ranks; return this rank's."""
    own, _ = dist.new_subgroups_by_enumeration(groups)
    assert isinstance(own, dist.ProcessGroup)
    return own


def train(options: Options, seed: int, steps: int) -> dict[str, Any]:
    """Train on four ranks; return the loss of each step, and what clones did in it."""
    alone, experts, ranks = (find_group(some) for some in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]))
    pipeline = Pipeline(options, ranks, 2, torch.device("cpu"))
    model, table = trainer.build_model(seed), pipeline.choose_table(trainer.MICROBATCHES, step=1)
    stages = nn.ModuleDict({str(stage): model[stage] for stage in table.layout.stages[pipeline.rank]})
    slots = [[Slots(m, int(s) + 1, experts, options) for m in stages[s].modules() if isinstance(m, MoE)] for s in stages]
    layers = BalancedLayers(options, slots, ExpertGroups(experts, experts, alone, experts), PlainGradients())
    optimizer, losses, clones = trainer.make_optimizer(list(stages.parameters())), [], []
    for step in range(1, steps + 1):
        batches = [trainer.draw_batch(seed, step, experts.rank(), microbatch) for microbatch in range(trainer.MICROBATCHES)]
        work = Stages({int(s): stages[s] for s in stages}, batches)
        layers.begin_step(step)
        pipeline.train(pipeline.prepare(table, FORM), work, FORM, step)
        clones.append(end_step(layers, trainer.MICROBATCHES).all)
        for gradient in [p.grad for name, p in stages.named_parameters() if "experts" not in name and p.grad is not None]:
            dist.all_reduce(gradient, group=experts)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(work.loss)
        losses.append(work.loss.item())
    return {"losses": losses, "clones": clones}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compile_planner()
    chosen = Options(schedule="dualpipev", eplb=True)
    result = {seed: train(chosen, int(seed), int(sys.argv[2])) for seed in sys.argv[3:]}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({**result, "megatron": any("megatron" in name for name in sys.modules)}))
    dist.destroy_process_group()
