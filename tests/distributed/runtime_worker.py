"""One rank of the executor's tests: tables of every family and layout over stages that are small tensors.

A stage computes tanh(w_s * x). It hands on x alone, or (x float32, y float64, mask bool, scale float32 that needs no gradient);
where the form is free, micro-batches differ in shapes and in how many of these there are, and y may be missing. Every rank
compares the weight gradients, summed over the ranks, with those of the whole model run in one piece, and the live activations of
x alone with the simulation's.
"""

import random
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Form, Member, Message, run_backward
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

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=30)
FLOAT, DOUBLE, MASK = torch.float32, torch.float64, torch.bool
FIXED = (Member((3, 2), FLOAT), Member((3,), DOUBLE), Member((3, 2), MASK), Member((1,), FLOAT, gradient=False))
VARYING = tuple(member._replace(shape=None) for member in FIXED)
# How much of what is sent is known before, of x alone and of all four.
ALONE: dict[str, Form | None] = {"x": FIXED[:1], "x, shapes vary": VARYING[:1]}
SEVERAL: dict[str, Form | None] = {"fixed": FIXED, "shapes vary": VARYING, "free": None}
FORMS = ALONE | SEVERAL
SEEDS = (7, 1234)
RANDOM_TABLES, RANDOM_TABLES_OF_SEVERAL = 300, 20


def make_input(form: str, seed: int, microbatch: int) -> Message:
    generator = torch.Generator().manual_seed(1000 * seed + microbatch)
    rows = 3 if form in ("x", "fixed") else 1 + microbatch % 3
    x = torch.rand(rows, 2, generator=generator)
    if form in ALONE:
        return (x,)
    y = torch.rand(rows, generator=generator, dtype=DOUBLE)
    mask = (torch.rand(2, rows, generator=generator) < 0.5).t()  # not contiguous
    scale = torch.tensor([0.5 + 0.1 * microbatch])
    if form == "free" and microbatch % 4 == 1:
        return x, y
    return x, None if form != "fixed" and microbatch % 4 == 2 else y, mask, scale


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


def compute(weight: torch.Tensor, message: Message) -> Message:
    """Return a stage's output, whose members depend on each other; what backward reads is no output that needs a gradient."""
    x, y, mask, scale = (*message, None, None, None)[:4]
    assert x is not None
    x = torch.tanh(Scale.apply(x, weight, torch.zeros((), requires_grad=True))) + 0.0
    if mask is not None and scale is not None:
        x, scale = torch.where(mask, x * scale, x), scale * 0.9
    y = None if y is None else 1.5 * y + x.double().sum(1)
    return (x, y, mask, scale)[: len(message)]


def compute_loss(message: Message) -> torch.Tensor:
    x, *others = message
    assert x is not None
    if not others:
        return x.sum()
    return x.square().sum() + (0.0 if others[0] is None else others[0].square().sum().float())


def run_serially(weights: list[torch.Tensor], form: str, seed: int, microbatch: int) -> torch.Tensor:
    """Return a micro-batch's loss of the model in one piece."""
    message = make_input(form, seed, microbatch)
    for weight in weights:
        message = compute(weight, message)
    return compute_loss(message)


class Saved:
    """A tensor that autograd holds for a backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Work:
    """Forward and backward of this rank's stages; frees outputs as trainers do; counts what autograd holds."""

    def __init__(self, table: ScheduleTable, rank: int, form: str, seed: int, train: bool) -> None:
        self.last, self.form, self.seed, self.train = table.layout.last_stage, form, seed, train
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
        self.loss = 0.0

    def hold(self, tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        self.held.add(saved)
        return saved

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        given = make_input(self.form, self.seed, microbatch)
        if received:
            assert [type(member) for member in received] == [type(member) for member in given]
            needs = [member is not None and member.requires_grad for member in received]
            wanted = [self.train and n < 2 and member is not None for n, member in enumerate(received)]
            assert needs == wanted, f"{received} needs other gradients"
        with torch.autograd.graph.saved_tensors_hooks(self.hold, lambda saved: saved.tensor):
            # The sum keeps the output out of what backward reads, so that its data may be freed.
            output = compute(self.weights[stage], received or given)
            if stage == self.last:
                output = (compute_loss(output),)
                self.loss += float(output[0].detach())  # type: ignore[union-attr]
        self.peak = max(self.peak, len(self.held))
        self.graphs[stage, microbatch] = (received, output)
        return output

    def release_output(self, stage: int, microbatch: int) -> None:
        # As Megatron frees a stage's output: what is on the wire or handed over must not notice.
        for member in self.graphs[stage, microbatch][1] if stage != self.last else ():
            if member is not None and (member.grad_fn is not None or not self.train):
                member.data = torch.empty(1, dtype=member.dtype)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        mask_and_scale = received[2:]
        assert all(member is None for member in mask_and_scale), "a gradient came for what needs none"
        return run_backward(*self.graphs.pop((stage, microbatch)), received)

    def finish_backward(self, stage: int, microbatch: int) -> None:
        self.unfinished.remove((stage, microbatch))

    def reduce(self, stage: int) -> None:
        assert stage not in {unfinished for unfinished, _ in self.unfinished}, "reduced before the last weight gradient"
        self.reduced.append(stage)


def run_table(channels: Channels, table: ScheduleTable, form: str, seed: int, train: bool = True) -> Work:
    table = add_reductions(table)
    validate(table)
    program = lower(table, channels.rank)
    channels.connect(program, FORMS[form], CPU)
    work = Work(table, channels.rank, form, seed, train)
    run_program(program, work, Mailbox(channels, FORMS[form], CPU))
    assert sorted(work.reduced) == (sorted(work.weights) if train else []), "a chunk's gradients were not reduced once"
    return work


def check_gradients(channels: Channels, table: ScheduleTable, form: str = "x", seed: int = 0) -> None:
    work = run_table(channels, table, form, seed)
    # The gradient of a stage with two homes is the sum of theirs.
    found = torch.zeros(table.layout.last_stage + 1)
    for stage, weight in work.weights.items():
        assert weight.grad is not None
        found[stage] = weight.grad
    dist.all_reduce(found)
    weights = [make_weight(stage) for stage in range(table.layout.last_stage + 1)]
    for microbatch in range(table.microbatches):
        run_serially(weights, form, seed, microbatch).backward()
    expected = torch.stack([weight.grad for weight in weights if weight.grad is not None])
    assert torch.allclose(found, expected), f"{table}, {form}, seed {seed}: {found} is not {expected}"
    assert not work.graphs and not work.unfinished and not work.held, "an activation or a weight gradient was left behind"
    if form in ALONE:
        simulated = simulate(table, Costs()).peak_activations[channels.rank] / table.layout.chunk_share
        saved_per_forward = 2  # Scale's input and tanh's output
        said = f"{table}: {work.peak} tensors live, {simulated} forwards simulated"
        assert work.peak <= saved_per_forward * simulated + 1e-6, said


def check_evaluation(channels: Channels, table: ScheduleTable) -> None:
    with torch.no_grad():
        total = torch.tensor(run_table(channels, table, "x", 0, train=False).loss)
        weights = [make_weight(stage) for stage in range(table.layout.last_stage + 1)]
        serial = sum(float(run_serially(weights, "x", 0, m)) for m in range(table.microbatches))
    dist.all_reduce(total)
    assert abs(float(total) - serial) < 1e-4


def list_tables(ranks: int) -> list[ScheduleTable]:
    tables = [build("1f1b", ranks, m) for m in (1, 3, 8)] + [build("gpipe", ranks, 3)]
    tables += [build("zb-h1", ranks, m) for m in (ranks, 3 * ranks)]
    tables += [build("interleaved", ranks, m, vpp=vpp) for m in (ranks, 3 * ranks) for vpp in (2, 3)]
    tables += [build(name, ranks, m) for name in ("dualpipev", "zbv") for m in (2 * ranks, 2 * ranks + 1, 5 * ranks)]
    return [*tables, build("dualpipe", ranks, 4 * ranks)]


def check_tensors(channels: Channels, ranks: int) -> None:
    for table in list_tables(ranks):
        check_gradients(channels, table)
    check_gradients(channels, prepare_table(build("zbv", ranks, 2 * ranks), splits=False))
    check_gradients(channels, build("zbv", ranks, 2 * ranks), "x, shapes vary")
    for layout in (lay_v(ranks), lay_looped(ranks, 2), lay_bidirectional(ranks)):
        check_evaluation(channels, build_forward_only(layout, 6))
    rng = random.Random(ranks)
    for _ in range(RANDOM_TABLES):
        check_gradients(channels, make_random_table(rng, ranks))
    print(f"ran {len(list_tables(ranks))} tables and {RANDOM_TABLES} random ones", flush=True)
    # Rank 0 alone has another table of the same size.
    text = to_csv(build("1f1b", ranks, 8))
    mine = from_csv(text.replace("0B6,0B7", "0B7,0B6") if channels.rank == 0 else text)
    check_refused(channels, mine, FORMS["x"], "have another table than rank 0")


def check_messages(channels: Channels, ranks: int) -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        # Another seed is other numbers on the same tables, but for those at random.
        tables = list_tables(ranks) if seed == SEEDS[0] else []
        for form in SEVERAL:
            for table in [*tables, *(make_random_table(rng, ranks) for _ in range(RANDOM_TABLES_OF_SEVERAL))]:
                check_gradients(channels, table, form, seed)
            print(f"ran {len(tables)} tables and {RANDOM_TABLES_OF_SEVERAL} random ones, {form}, seed {seed}", flush=True)
    other = FIXED[:3] if channels.rank == 1 else FIXED
    check_refused(channels, build("1f1b", ranks, 4), other, "ranks 1 send messages of another form than rank 0")


def check_refused(channels: Channels, table: ScheduleTable, form: Form | None, said: str) -> None:
    try:
        channels.connect(lower(table, channels.rank), form, CPU)
    except ScheduleError as error:
        assert said in str(error)
        print("refused what differs between ranks", flush=True)


def run(what: str) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels = Channels(list(range(ranks)), rank, TIMEOUT)
    for sender, receiver in ((0, 1), (1, 0)) if rank < 2 else ():
        waits = channels.pick_group(sender, receiver)._get_backend(CPU).options._timeout
        assert waits == TIMEOUT, f"a rank that stops answering would be waited for {waits}"
    {"tensors": check_tensors, "messages": check_messages}[what](channels, ranks)
