"""What each stage of a PipelineModule holds, without its data and its other ranks: DeepSpeed's own code under fake tensors.

A script's function makes the model as one rank of many. Each stage runs a micro-batch forward on what the stage before it made;
parameters are counted, and the bytes that autograd keeps, activation checkpointing included.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from counterflow.errors import PlanError
from counterflow.trainer.fake_rank import Kept, fake_group


@dataclass(frozen=True)
class StageHolds:
    """What one stage was found to hold on its rank: the number of parameters, and bytes that a micro-batch keeps."""

    stage: int
    parameters: int
    kept: int
    seconds: float


def measure_module(
    make: Callable[[], Any], ranks: int, inputs: Any, labels: Any = None, dtype: torch.dtype | None = None
) -> list[StageHolds]:
    """Return what each stage holds of the PipelineModule that ``make`` returns, on ``ranks`` ranks.

    ``inputs`` is a micro-batch as the first layer takes it, a tensor or a tuple; with ``labels`` the last stage computes a loss.
    The engine would make the model's parameters of ``dtype``. Run it in a process that has no process group. Raises `PlanError`
    for a model that reads the values of tensors, as routers of experts do.
    """
    if torch.distributed.is_initialized():
        raise PlanError("a dry run makes a process group of its own, and there is one: run it in a process of its own")
    found: list[StageHolds] = []
    stages, rank = 1, 0
    while len(found) < stages:
        begin = time.monotonic()
        with _be_rank(rank, ranks):
            model = _build(make, dtype)
            stages = model.num_pipeline_stages()
            if model.stage_id != len(found):
                # Only a model that is built tells where its stages are.
                rank = min(model._topo.filter_match(pipe=len(found)))
                continue
            kept = Kept(model)
            inputs = _run_stage(model, kept, inputs, labels)
            parameters = sum(parameter.numel() for parameter in model.parameters())
        found.append(StageHolds(len(found), parameters, kept.size, time.monotonic() - begin))
    return found


def _build(make: Callable[[], Any], dtype: torch.dtype | None) -> Any:
    """Return the model, its parameters of ``dtype``; it is on no device, and a fake parameter cannot move to one."""
    move, default = torch.nn.Module.to, torch.get_default_dtype()
    torch.nn.Module.to = lambda self, *given, **named: self  # type: ignore[method-assign]
    torch.set_default_dtype(dtype or default)
    try:
        return make()
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]
        torch.set_default_dtype(default)


@contextmanager
def _be_rank(rank: int, ranks: int) -> Iterator[None]:
    """Be a rank for DeepSpeed, under fake tensors."""
    import deepspeed
    from torch._subclasses.fake_tensor import FakeTensorMode

    os.environ.setdefault("LOCAL_RANK", "0")
    # On a CPU it would compile a collective of its own.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with fake_group(rank, ranks):
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield
        finally:
            deepspeed.comm.comm.cdb = None


def _run_stage(model: Any, kept: Kept, inputs: Any, labels: Any) -> Any:
    """Run a micro-batch through a stage; return shapes and types of what it sends on."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    model.train()
    given = _each(inputs, lambda one: _make_like(one, wants_grad=model.stage_id > 0))
    try:
        with kept.watch():
            out = model(given)
            if model.stage_id == model.num_pipeline_stages() - 1 and model.loss_fn is not None and labels is not None:
                out = model.loss_fn(out, _each(labels, lambda one: _make_like(one, wants_grad=False)))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PlanError(
            f"stage {model.stage_id} reads the values of a tensor ({error.func}), which a dry run has not: leave out layers that "
            f"route tokens, or count them on a rank that runs"
        ) from None
    return _each(out, lambda one: (tuple(one.shape), one.dtype))


def _make_like(one: Any, wants_grad: bool) -> torch.Tensor:
    """Return an empty tensor like a real one, or of a shape and type."""
    shape, dtype = (one.shape, one.dtype) if isinstance(one, torch.Tensor) else one
    return torch.empty(shape, dtype=dtype, requires_grad=wants_grad and dtype.is_floating_point)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to a tensor, or to each of a tuple of them; a shape with its type is one."""
    is_form = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)
    return tuple(change(one) for one in value) if isinstance(value, (tuple, list)) and not is_form else change(value)
