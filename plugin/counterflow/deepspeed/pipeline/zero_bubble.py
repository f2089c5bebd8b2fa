"""Split backward passes under DeepSpeed, by `counterflow.trainer.splits`: what is split, and where the gradients of a W go.

A weight's gradient that comes in a W goes the way that autograd's would have gone: to ``.grad``, and from there where the
optimizer collects gradients.
"""

from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from counterflow.deepspeed.state import graphs_of
from counterflow.trainer import splits
from counterflow.trainer.engine_splits import split_engine_modules


def add_to_optimizer(optimizer: ref[Any], group: int, number: int, weight: Any, gradient: torch.Tensor) -> None:
    """Add a gradient that a W computed, as the hooks of the optimizer do after autograd has added one."""
    keeper: Any = optimizer()
    if hasattr(keeper, "_update_hp_grad"):
        # BF16_Optimizer adds what lies in .grad to a sum of its own after each backward; this one comes later.
        kept, weight.grad = weight.grad, gradient
        keeper._update_hp_grad(weight, group, number, False)
        weight.grad = kept
        return
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    if hasattr(keeper, "process_gradients"):
        keeper.process_gradients(weight, group)


def split_model(engine: Any) -> None:
    """Let gradients of the engine's weights wait for a W; those of weights that its optimizer does not have are not split."""
    optimizer, model = engine.optimizer, engine.module
    for name in ("bf16_groups", "bit16_groups", "fp16_groups"):
        if (groups := getattr(optimizer, name, None)) is not None:
            break
    else:
        groups = [group["params"] for group in getattr(optimizer, "param_groups", [])]
    for number, group in enumerate(groups):
        for place, weight in enumerate(group):
            splits.note_weight(weight, partial(add_to_optimizer, ref(optimizer), number, place), "deepspeed")
    split_engine_modules(model)
    speaks = dist.get_rank(engine.grid.get_data_parallel_group()) == 0
    graphs_of[model] = splits.GraphSplits(partial(print, flush=True) if speaks else lambda line: None)
