"""One rank of the executor's tests: tables of every family and layout over stages that are small tensors.

Each stage computes tanh(w_s * x); the loss is the sum of the last stage's output. Every rank compares its
weight gradients with those of the whole model run in one piece.
"""

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.runtime.executor import run_row
from counterflow.runtime.mailbox import Channels, Mailbox, TransferPlan
from counterflow.schedule import ScheduleTable, build, build_forward_only, from_csv, lay_looped, lay_v, to_csv, validate

SHAPE = (3, 2)
CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=30)


def make_input(microbatch: int) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 6).reshape(SHAPE) + 0.1 * microbatch


def make_weight(stage: int) -> torch.Tensor:
    return torch.tensor(0.7 + 0.05 * stage, requires_grad=True)


def compute_reference(stages: int, microbatches: int) -> dict[int, torch.Tensor]:
    weights = [make_weight(stage) for stage in range(stages)]
    for microbatch in range(microbatches):
        x = make_input(microbatch)
        for weight in weights:
            x = torch.tanh(weight * x)
        x.sum().backward()
    return {stage: weight.grad for stage, weight in enumerate(weights) if weight.grad is not None}


class Work:
    """Forward and backward of this rank's stages; frees outputs as Megatron does."""

    def __init__(self, table: ScheduleTable, rank: int, train: bool) -> None:
        self.last, self.train = table.layout.last_stage, train
        self.weights = {stage: make_weight(stage) for stage in table.layout.stages[rank]}
        self.saved: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        self.outputs = 0.0

    def forward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        x = make_input(microbatch) if received is None else received.requires_grad_(self.train)
        # The sum keeps the output out of what backward reads, so that its data may be freed.
        y = torch.tanh(self.weights[stage] * x) + 0.0
        if stage == self.last:
            self.outputs += float(y.detach().sum())
        self.saved[stage, microbatch] = (received, y)
        return y

    def release_output(self, stage: int, microbatch: int) -> None:
        # As Megatron frees a stage's output: what is on the wire or handed over must not notice.
        y = self.saved[stage, microbatch][1]
        y.data = torch.empty(1)

    def backward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        x, y = self.saved.pop((stage, microbatch))
        gradient = torch.ones(SHAPE) if received is None else received
        torch.autograd.Variable._execution_engine.run_backward(
            (y,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        return None if x is None else x.grad


def run(channels: Channels, table: ScheduleTable, train: bool = True) -> Work:
    validate(table)
    plan = TransferPlan(table)
    channels.connect(plan, CPU)
    work = Work(table, channels.rank, train)
    run_row(table, channels.rank, work, Mailbox(channels, plan, SHAPE, torch.float32, CPU))
    return work


def check_gradients(channels: Channels, table: ScheduleTable) -> None:
    work = run(channels, table)
    expected = compute_reference(table.layout.last_stage + 1, table.microbatches)
    for stage, weight in work.weights.items():
        assert weight.grad is not None
        assert torch.allclose(weight.grad, expected[stage]), f"{table.name}, {stage}: {weight.grad} is not {expected[stage]}"
    assert not work.saved, "an activation was left behind"


def check_another_table_is_refused(channels: Channels) -> None:
    # Rank 0 alone has another table of the same size.
    text = to_csv(build("1f1b", dist.get_world_size(), 8))
    mine = from_csv(text.replace("0B6,0B7", "0B7,0B6") if channels.rank == 0 else text)
    try:
        channels.connect(TransferPlan(mine), CPU)
    except ScheduleError as error:
        assert "have different tables" in str(error)
        print("refused another table", flush=True)


def main() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels = Channels(list(range(ranks)), rank, TIMEOUT)
    for sender, receiver in ((0, 1), (1, 0)):
        waits = channels.pick_group(sender, receiver)._get_backend(CPU).options._timeout
        assert waits == TIMEOUT, f"a rank that stops answering would be waited for {waits}"
    tables = [build("1f1b", ranks, m) for m in (1, 3, 8)]
    tables += [build("interleaved", ranks, m, vpp=vpp) for m in (ranks, 3 * ranks) for vpp in (2, 3)]
    tables += [build("dualpipev", ranks, m) for m in (2 * ranks, 2 * ranks + 1, 5 * ranks)]
    for table in tables:
        check_gradients(channels, table)
    for layout in (lay_v(ranks), lay_looped(ranks, 2)):
        with torch.no_grad():
            work = run(channels, build_forward_only(layout, 5), train=False)
        if layout.rank_of[layout.last_stage] == rank:
            serial = sum(float(serial_output(layout.last_stage + 1, m).sum()) for m in range(5))
            assert abs(work.outputs - serial) < 1e-4
    check_another_table_is_refused(channels)
    print(f"ran {len(tables)} tables", flush=True)
    os._exit(0)  # a refused table leaves transfers open that a clean end would wait for


def serial_output(stages: int, microbatch: int) -> torch.Tensor:
    x = make_input(microbatch)
    for stage in range(stages):
        x = torch.tanh(make_weight(stage).detach() * x)
    return x


if __name__ == "__main__":
    sys.exit(main())
