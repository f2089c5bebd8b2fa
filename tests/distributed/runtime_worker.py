"""One rank of the executor's tests: tables of every family and layout over stages that are small tensors.

Each stage computes tanh(w_s * x); the loss is the sum of the last stage's output. Every rank compares its
weight gradients with those of the whole model run in one piece, and its live activations with the simulation's.
"""

import random
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Member, Message, run_backward
from counterflow.runtime.weight_grads import defer_weight_grad
from counterflow.schedule import (
    Costs,
    ScheduleTable,
    add_reductions,
    build,
    build_forward_only,
    from_csv,
    lay_bidirectional,
    lay_looped,
    lay_v,
    simulate,
    to_csv,
    validate,
)
from counterflow.trainer.tables import prepare_table
from random_tables import make_random_table

SHAPE = (3, 2)
CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=30)
RANDOM_TABLES = 300


def make_input(microbatch: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 6).reshape(SHAPE)[: shape[0]] + 0.01 * microbatch


def make_weight(stage: int) -> torch.Tensor:
    weight = torch.tensor(0.7 + 0.05 * stage, requires_grad=True)
    weight.grad = torch.zeros(())
    return weight


class Scale(torch.autograd.Function):
    """w * x, whose weight gradient can wait."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ((x,), (grad,), weight) = ctx.saved_tensors, grads, ctx.weight

        def add() -> None:
            weight.grad += (grad * x).sum()

        defer_weight_grad(add)
        return grad * weight.detach(), None, torch.zeros(())


def compute_reference(stages: int, microbatches: int, shape_of: Callable[[int], tuple[int, ...]]) -> dict[int, torch.Tensor]:
    weights = [make_weight(stage) for stage in range(stages)]
    for microbatch in range(microbatches):
        x = make_input(microbatch, shape_of(microbatch))
        for weight in weights:
            x = torch.tanh(weight * x)
        x.sum().backward()
    return {stage: weight.grad for stage, weight in enumerate(weights) if weight.grad is not None}


class Saved:
    """A tensor that autograd holds for a backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Work:
    """Forward and backward of this rank's stages; frees outputs as Megatron does; counts what autograd holds."""

    def __init__(self, table: ScheduleTable, rank: int, train: bool, shape_of: Callable[[int], tuple[int, ...]]) -> None:
        self.last, self.train, self.shape_of = table.layout.last_stage, train, shape_of
        self.weights = {stage: make_weight(stage) for stage in table.layout.stages[rank]}
        self.graphs: dict[tuple[int, int], tuple[Message, Message]] = {}
        self.held: weakref.WeakSet[Saved] = weakref.WeakSet()
        self.unfinished = {
            (stage, m)
            for stage in table.layout.stages[rank]
            for m in range(table.microbatches)
            if train and table.rank_of(stage, m) == rank
        }
        self.reduced: list[int] = []
        self.peak = 0
        self.outputs = 0.0

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        (x,) = received or (make_input(microbatch, self.shape_of(microbatch)),)
        assert x is not None and (not received or x.requires_grad == self.train)
        anchor = torch.zeros((), requires_grad=self.train)

        def pack(tensor: torch.Tensor) -> Saved:
            saved = Saved(tensor)
            self.held.add(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            # The sum keeps the output out of what backward reads, so that its data may be freed.
            y = torch.tanh(Scale.apply(x, self.weights[stage].detach() if not self.train else self.weights[stage], anchor)) + 0.0
        self.peak = max(self.peak, len(self.held))
        if stage == self.last:
            self.outputs += float(y.detach().sum())
        self.graphs[stage, microbatch] = (received, (y,))
        return (y,)

    def release_output(self, stage: int, microbatch: int) -> None:
        # As Megatron frees a stage's output: what is on the wire or handed over must not notice.
        (y,) = self.graphs[stage, microbatch][1]
        if stage != self.last:
            y.data = torch.empty(1)  # type: ignore[union-attr]

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        return run_backward(*self.graphs.pop((stage, microbatch)), received)

    def finish_backward(self, stage: int, microbatch: int) -> None:
        self.unfinished.remove((stage, microbatch))

    def reduce(self, stage: int) -> None:
        assert stage not in {unfinished for unfinished, _ in self.unfinished}, "reduced before the last weight gradient"
        self.reduced.append(stage)


def keep_shape(microbatch: int) -> tuple[int, ...]:
    return SHAPE


def vary_shape(microbatch: int) -> tuple[int, ...]:
    return (1 + microbatch % 3, 2)


def run_table(
    channels: Channels,
    table: ScheduleTable,
    train: bool = True,
    shape_of: Callable[[int], tuple[int, ...]] = keep_shape,
) -> Work:
    table = add_reductions(table)
    validate(table)
    program = lower(table, channels.rank)
    form = (Member(SHAPE if shape_of is keep_shape else None, torch.float32),)
    channels.connect(program, form, CPU)
    work = Work(table, channels.rank, train, shape_of)
    run_program(program, work, Mailbox(channels, form, CPU))
    assert sorted(work.reduced) == (sorted(work.weights) if train else []), "a chunk's gradients were not reduced once"
    return work


def check_gradients(channels: Channels, table: ScheduleTable, **how: Any) -> None:
    work = run_table(channels, table, **how)
    expected = compute_reference(table.layout.last_stage + 1, table.microbatches, how.get("shape_of", keep_shape))
    for stage, weight in work.weights.items():
        assert weight.grad is not None
        if table.layout.homes[stage] != (channels.rank,):  # the gradient of the two homes is the sum of theirs
            continue
        assert torch.allclose(weight.grad, expected[stage]), f"{table.name}, {stage}: {weight.grad} is not {expected[stage]}"
    assert not work.graphs and not work.unfinished and not work.held, "an activation or a weight gradient was left behind"
    simulated = simulate(table, Costs()).peak_activations[channels.rank] / table.layout.chunk_share
    saved_per_forward = 2  # Scale's input and tanh's output
    assert work.peak <= saved_per_forward * simulated + 1e-6, f"{table}: {work.peak} tensors live, {simulated} forwards simulated"


def check_bidirectional(channels: Channels, table: ScheduleTable) -> None:
    work = run_table(channels, table)
    expected = compute_reference(table.layout.last_stage + 1, table.microbatches, keep_shape)
    for stage in range(table.layout.last_stage + 1):
        mine = work.weights.get(stage)
        total = mine.grad.clone() if mine is not None and mine.grad is not None else torch.zeros(())
        dist.all_reduce(total)
        assert torch.allclose(total, expected[stage]), f"{table.name}, {stage}: {total} is not {expected[stage]}"


def check_another_table_is_refused(channels: Channels) -> None:
    # Rank 0 alone has another table of the same size.
    text = to_csv(build("1f1b", dist.get_world_size(), 8))
    mine = from_csv(text.replace("0B6,0B7", "0B7,0B6") if channels.rank == 0 else text)
    try:
        channels.connect(lower(mine, channels.rank), None, CPU)
    except ScheduleError as error:
        assert "have another table than rank 0" in str(error)
        print("refused another table", flush=True)


def list_tables(ranks: int) -> list[ScheduleTable]:
    tables = [build("1f1b", ranks, m) for m in (1, 3, 8)] + [build("gpipe", ranks, 3)]
    tables += [build("zb-h1", ranks, m) for m in (ranks, 3 * ranks)]
    tables += [build("interleaved", ranks, m, vpp=vpp) for m in (ranks, 3 * ranks) for vpp in (2, 3)]
    tables += [build(name, ranks, m) for name in ("dualpipev", "zbv") for m in (2 * ranks, 2 * ranks + 1, 5 * ranks)]
    return tables


def run(_: None) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels = Channels(list(range(ranks)), rank, TIMEOUT)
    for sender, receiver in ((0, 1), (1, 0)):
        waits = channels.pick_group(sender, receiver)._get_backend(CPU).options._timeout
        assert waits == TIMEOUT, f"a rank that stops answering would be waited for {waits}"
    for table in list_tables(ranks):
        check_gradients(channels, table)
    check_gradients(channels, prepare_table(build("zbv", ranks, 2 * ranks), splits=False))
    check_gradients(channels, build("zbv", ranks, 2 * ranks), shape_of=vary_shape)
    check_bidirectional(channels, build("dualpipe", ranks, 4 * ranks))
    for layout in (lay_v(ranks), lay_looped(ranks, 2), lay_bidirectional(ranks)):
        with torch.no_grad():
            work = run_table(channels, build_forward_only(layout, 6), train=False)
        total = torch.tensor(work.outputs)
        dist.all_reduce(total)
        serial = sum(float(serial_output(layout.last_stage + 1, m).sum()) for m in range(6))
        assert abs(float(total) - serial) < 1e-4
    print(f"ran {len(list_tables(ranks))} tables", flush=True)
    rng = random.Random(ranks)
    for _ in range(RANDOM_TABLES):
        check_gradients(channels, make_random_table(rng, ranks))
    print(f"ran {RANDOM_TABLES} random tables", flush=True)
    check_another_table_is_refused(channels)


def serial_output(stages: int, microbatch: int) -> torch.Tensor:
    x = make_input(microbatch)
    for stage in range(stages):
        x = torch.tanh(make_weight(stage).detach() * x)
    return x
