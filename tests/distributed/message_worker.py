"""One rank of the tests of messages: stages that hand on several tensors of several types, under tables of every family.

A message is (x float32, y float64, mask bool, scale float32 that needs no gradient); where its form is free, micro-batches
differ in shapes and in how many of these there are, and y may be missing. Every rank compares the weight gradients, summed
over the ranks, with those of the whole model run in one piece.
"""

import random
from typing import Any

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Form, Member, Message, run_backward
from counterflow.schedule import ScheduleTable, build
from random_tables import make_random_table
from runtime_worker import CPU, TIMEOUT, Scale, list_tables, make_weight

SEEDS = (7, 1234)
RANDOM_TABLES = 40
FLOAT, DOUBLE, MASK = torch.float32, torch.float64, torch.bool
FIXED = (Member((3, 2), FLOAT), Member((3,), DOUBLE), Member((3, 2), MASK), Member((1,), FLOAT, gradient=False))
# How much of what is sent is known before.
FORMS: dict[str, Form | None] = {
    "fixed": FIXED,
    "shapes vary": tuple(member._replace(shape=None) for member in FIXED),
    "free": None,
}


def make_input(form: str, seed: int, microbatch: int) -> Message:
    generator = torch.Generator().manual_seed(1000 * seed + microbatch)
    rows = 3 if form == "fixed" else 1 + microbatch % 3
    x = torch.rand(rows, 2, generator=generator)
    y = torch.rand(rows, generator=generator, dtype=DOUBLE)
    mask = (torch.rand(2, rows, generator=generator) < 0.5).t()  # not contiguous
    scale = torch.tensor([0.5 + 0.1 * microbatch])
    if form == "free" and microbatch % 4 == 1:
        return x, y
    return x, None if form != "fixed" and microbatch % 4 == 2 else y, mask, scale


def compute(weight: torch.Tensor, message: Message) -> Message:
    """Return a stage's output, whose members depend on each other; what backward reads is no output that needs a gradient."""
    x, y, mask, scale = (*message, None, None)[:4]
    assert x is not None
    x = torch.tanh(Scale.apply(x, weight, torch.zeros((), requires_grad=True))) + 0.0
    if mask is not None and scale is not None:
        x, scale = torch.where(mask, x * scale, x), scale * 0.9
    y = None if y is None else 1.5 * y + x.double().sum(1)
    return (x, y, mask, scale)[: len(message)]


def compute_loss(message: Message) -> torch.Tensor:
    x, y, *_ = message
    assert x is not None
    return x.square().sum() + (0.0 if y is None else y.square().sum().float())


def compute_reference(table: ScheduleTable, form: str, seed: int) -> torch.Tensor:
    weights = [make_weight(stage) for stage in range(table.layout.last_stage + 1)]
    for microbatch in range(table.microbatches):
        message = make_input(form, seed, microbatch)
        for weight in weights:
            message = compute(weight, message)
        compute_loss(message).backward()
    return torch.stack([weight.grad for weight in weights if weight.grad is not None])


class Work:
    """Forward and backward of this rank's stages; frees outputs that need gradients, as trainers do."""

    def __init__(self, table: ScheduleTable, rank: int, form: str, seed: int) -> None:
        self.last, self.form, self.seed = table.layout.last_stage, form, seed
        self.weights = {stage: make_weight(stage) for stage in table.layout.stages[rank]}
        self.graphs: dict[tuple[int, int], tuple[Message, Message]] = {}

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        given = make_input(self.form, self.seed, microbatch)
        if received:
            assert [type(member) for member in received] == [type(member) for member in given]
            needs = [member is not None and member.requires_grad for member in received]
            assert needs == [True, received[1] is not None, False, False][: len(needs)], f"{received} needs other gradients"
        output = compute(self.weights[stage], received or given)
        output = (compute_loss(output),) if stage == self.last else output
        self.graphs[stage, microbatch] = (received, output)
        return output

    def release_output(self, stage: int, microbatch: int) -> None:
        for member in self.graphs[stage, microbatch][1]:
            if member is not None and member.grad_fn is not None and stage != self.last:
                member.data = torch.empty(1, dtype=member.dtype)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        if received:
            mask_and_scale = received[2:]
            assert all(member is None for member in mask_and_scale), "a gradient came for what needs none"
        return run_backward(*self.graphs.pop((stage, microbatch)), received)

    def finish_backward(self, stage: int, microbatch: int) -> None:
        pass


def check_gradients(channels: Channels, table: ScheduleTable, form: str, seed: int) -> None:
    program = lower(table, channels.rank)
    channels.connect(program, FORMS[form], CPU)
    work = Work(table, channels.rank, form, seed)
    run_program(program, work, Mailbox(channels, FORMS[form], CPU))
    found = torch.zeros(table.layout.last_stage + 1)
    for stage, weight in work.weights.items():
        found[stage] += weight.grad if weight.grad is not None else 0.0
    dist.all_reduce(found)
    expected = compute_reference(table, form, seed)
    assert torch.allclose(found, expected, rtol=1e-4), f"{table}, {form}, seed {seed}: {found} is not {expected}"


def check_another_form_is_refused(channels: Channels) -> None:
    program = lower(build("1f1b", dist.get_world_size(), 4), channels.rank)
    other: Any = FIXED[:3] if channels.rank == 1 else FIXED
    try:
        channels.connect(program, other, CPU)
    except ScheduleError as error:
        assert "ranks 1 send messages of another form than rank 0" in str(error)
        print("refused another form", flush=True)


def run(_: None) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels = Channels(list(range(ranks)), rank, TIMEOUT)
    families = [*list_tables(ranks), build("dualpipe", ranks, 4 * ranks)]
    for seed in SEEDS:
        rng = random.Random(seed)
        for form in FORMS:
            for table in [*families, *(make_random_table(rng, ranks) for _ in range(RANDOM_TABLES))]:
                check_gradients(channels, table, form, seed)
            print(f"ran {len(families)} tables and {RANDOM_TABLES} random ones, {form}, seed {seed}", flush=True)
    check_another_form_is_refused(channels)
