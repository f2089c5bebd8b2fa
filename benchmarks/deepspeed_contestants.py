"""DeepSpeed's own pipeline schedules, and this project's under DeepSpeed, over the stages of `contestants` that sleep."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")

from collections.abc import Iterator
from itertools import count, repeat
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe import schedule as upstream
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

from benchmarks.contestants import SHAPE, Contestant, Size, SleepingStage, SleepLog
from counterflow.deepspeed.install import install
from counterflow.patching import Patches
from counterflow.schedule import FAMILIES, ScheduleTable, build, from_csv

# What the plugin notes and wraps stays in force from the first contestant that needs it on.
_INSTALLED: list[Any] = []


class EnteringStage(SleepingStage):
    """The first stage: DeepSpeed loads inputs that want no gradient, and here the stage is to have an I like the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something that depends on input and weight."""
        return super().forward(x.detach().requires_grad_())


class DeepSpeedContestant(Contestant):
    """An engine of DeepSpeed's; ``train_batch`` is its step, whose optimizer step comes after the last sleep and is not timed."""

    def _prepare(self, made: Any, pipeline_ranks: int, size: Size, log: SleepLog, section: dict[str, Any]) -> None:
        kinds = [EnteringStage, *[SleepingStage] * (self.chunks * size.ranks - 1)]
        layers = [LayerSpec(kind, log, size.find_sleep(self.chunks)) for kind in kinds]
        module = made(layers, num_stages=pipeline_ranks, loss_fn=lambda output, labels: output.sum(), partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": SHAPE[0],
            "gradient_accumulation_steps": size.microbatches * pipeline_ranks // size.ranks,
            "steps_per_print": 10**9,
            **section,
        }
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        self._engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
        self._batches = repeat((torch.zeros(SHAPE), torch.zeros(())))

    def step(self) -> None:
        """Run one step on this rank."""
        # DeepSpeed sends by the grid of the engine that was made last.
        p2p._grid = self._engine.grid
        self._engine.train_batch(self._batches)


class PlainContestant(DeepSpeedContestant):
    """DeepSpeed's own 1F1B (``TrainSchedule``), or its ``DualPipeVSchedule``, which splits no backward pass."""

    def __init__(self, schedule: str, size: Size, log: SleepLog) -> None:
        self.name = f"deepspeed {schedule}"
        self.table = read_upstream_table(schedule, size)
        self._prepare(DualPipeVModule if self.chunks > 1 else PipelineModule, size.ranks, size, log, {})


class KeyContestant(DeepSpeedContestant):
    """This project's schedule in DeepSpeed's engine, as the key of a JSON asks for it.

    A schedule that joins two replicas has half the pipeline ranks, and half of the micro-batches enter at each replica.
    """

    def __init__(self, schedule: str, size: Size, log: SleepLog) -> None:
        self.name = f"key {schedule}"
        self.table = build(schedule, size.ranks, size.microbatches)
        if not _INSTALLED:
            _INSTALLED.append(install(Patches(), {}, {}))
        section = {"counterflow": {"schedule": schedule}}
        self._prepare(PipelineModule, size.ranks // FAMILIES[schedule].replicas, size, log, section)


def read_upstream_table(schedule: str, size: Size) -> ScheduleTable:
    """Return the table that DeepSpeed's instructions stand for: forwards and whole backwards, in their order on each rank."""
    if schedule == "TrainSchedule":
        return build("1f1b", size.ranks, size.microbatches)
    rows = (",".join(_read_row(schedule, size, rank)) for rank in range(size.ranks))
    return from_csv("\n".join(rows), schedule)


def _read_row(schedule: str, size: Size, rank: int) -> Iterator[str]:
    numbers: dict[tuple[str, int], Iterator[int]] = {}
    kinds = {"ForwardPass": "F", "BackwardPass": "B"}
    for instructions in getattr(upstream, schedule)(micro_batches=size.microbatches, stages=size.ranks, stage_id=rank).steps():
        for instruction in instructions:
            kind = kinds.get(type(instruction).__name__)
            if kind is not None:
                stage = 2 * size.ranks - 1 - rank if instruction.phase else rank
                yield f"{stage}{kind}{next(numbers.setdefault((kind, stage), count()))}"


def list_deepspeed_contestants(size: Size, log: SleepLog) -> list[Contestant]:
    """Return DeepSpeed's own schedules, then this project's; a collective call."""
    deepspeed.init_distributed("gloo", verbose=False)
    own = [PlainContestant(schedule, size, log) for schedule in ("TrainSchedule", "DualPipeVSchedule")]
    keys = ("1f1b", "interleaved", "zbv", "dualpipev", "dualpipe")
    long = (key for key in keys if size.ranks // FAMILIES[key].replicas > 1)
    return [*own, *(KeyContestant(schedule, size, log) for schedule in long)]
