"""Who runs in the runtime's benchmark: this project, torch's schedules and Megatron's, over the same stages that sleep.

A stage sleeps instead of computing: F in its forward, I on the path to the input's gradient, W on the path to the weight's. So
a whole backward sleeps I + W, and whoever splits backwards, in whatever way, sleeps each in its own place. Each sleep is
written down with its times; what a contestant's step took is read from there, the same way for all.
"""

import csv
import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterflow.patching import Patches
from counterflow.platform import install_cpu
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Member, Message, run_backward
from counterflow.runtime.recorder import Recorder, append_record
from counterflow.runtime.weight_grads import defer_weight_grad
from counterflow.schedule import Layout, ScheduleTable, build, from_csv, lay_looped, lay_straight, lay_v

# Sequence, micro-batch and hidden size, as Megatron sends them; small, since nothing is computed.
SHAPE = (8, 1, 8)
FORM = (Member(SHAPE, torch.float32),)
CPU = torch.device("cpu")
# Seconds that a sleep may come back late, and a little.
TIMER_SLACK = 0.0004
TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Size:
    """What all contestants run: pipeline ranks, micro-batches, and the seconds of each F, I and W of half a rank's model."""

    ranks: int
    microbatches: int
    seconds: float

    def find_sleep(self, chunks: int) -> float:
        """Return the seconds of one F, I or W of one chunk: the model is the same however many chunks it is cut into."""
        return self.seconds * 2 / chunks


@dataclass
class SleepLog:
    """The sleeps of one rank: kind, begin and end, in seconds of the machine's monotonic clock."""

    entries: list[tuple[str, float, float]] = field(default_factory=list)

    def sleep(self, kind: str, seconds: float) -> None:
        """Sleep and write it down; ends on time, where the system's timer would be a fifth of a millisecond late."""
        begin = time.monotonic()
        time.sleep(max(0.0, seconds - TIMER_SLACK))
        while (end := time.monotonic()) - begin < seconds:
            pass
        self.entries.append((kind, begin, end))


class _SleepingPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, sleep: Callable[[], None]) -> torch.Tensor:
        ctx.sleep = sleep
        return tensor.clone()


class _InputPath(_SleepingPath):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.sleep()
        return gradient.contiguous(), None  # a sum's gradient is one number seen many times


class _WeightPath(_SleepingPath):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # At once, unless this project's executor holds it for the W; torch does not come here in an I at all.
        defer_weight_grad(ctx.sleep)
        return gradient.contiguous(), None


class SleepingStage(torch.nn.Module):
    """A stage whose F, I and W sleep ``seconds`` each, times their ``shares``."""

    def __init__(self, log: SleepLog, seconds: float, shares: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SHAPE))
        self._sleep = {kind: partial(log.sleep, kind, seconds * share) for kind, share in zip("FIW", shares, strict=True)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something of the input's shape that depends on input and weight."""
        self._sleep["F"]()
        result: torch.Tensor = _InputPath.apply(x, self._sleep["I"]) + _WeightPath.apply(self.weight, self._sleep["W"])
        return result


def make_input() -> torch.Tensor:
    """Return an input of the first stage; it wants a gradient, so that this stage has an I like the others."""
    return torch.zeros(SHAPE, requires_grad=True)


class Contestant(ABC):
    """One who can run a training step; ``table`` is what it runs, for the simulator."""

    name: str
    table: ScheduleTable

    @property
    def chunks(self) -> int:
        """In how many chunks a rank's share of the model is cut; where two replicas share ranks, each has half of the ranks."""
        return (self.table.layout.last_stage + 1) // self.table.ranks

    @abstractmethod
    def step(self) -> None:
        """Run one step on this rank."""

    def finish_step(self, number: int) -> None:  # noqa: B027
        """Do what is not part of the step: nothing, for most."""


class BareWork:
    """A rank's work for the runtime, with nobody to tell, to reduce with or to free for."""

    def finish_backward(self, stage: int, microbatch: int) -> None:
        """There is nobody to tell."""

    def reduce(self, stage: int) -> None:
        """There is nobody to reduce with."""

    def release_output(self, stage: int, microbatch: int) -> None:
        """Nothing is worth freeing."""


class StageWork(BareWork):
    """Forwards and backwards of this rank's stages, as a trainer does them for this project's runtime."""

    def __init__(self, stages: dict[int, SleepingStage], last_stage: int) -> None:
        self._stages, self._last_stage = stages, last_stage
        self._saved: dict[tuple[int, int], tuple[Message, Message]] = {}

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the stage's output, the loss on the last."""
        x = received or (make_input(),)
        y: torch.Tensor = self._stages[stage](x[0])
        y = y.sum() if stage == self._last_stage else y
        self._saved[stage, microbatch] = (x, (y,))
        return (y,)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the input's gradient."""
        return run_backward(*self._saved.pop((stage, microbatch)), received)


class OursContestant(Contestant):
    """This project's runtime; records its steps under ``records``."""

    def __init__(self, schedule: str, size: Size, log: SleepLog, channels: Channels, records: Path, **options: Any) -> None:
        self.name = f"counterflow {schedule}"
        self.table = build(schedule, size.ranks, size.microbatches, **options)
        self._channels, self._program = channels, lower(self.table, channels.rank)
        channels.connect(self._program, FORM, CPU)
        layout = self.table.layout
        seconds = size.find_sleep(layout.chunks)
        stages = {stage: SleepingStage(log, seconds) for stage in layout.stages[channels.rank]}
        self._work = StageWork(stages, layout.last_stage)
        self._recorder, self._records = Recorder(channels.rank, use_cuda_events=False), records / schedule

    def step(self) -> None:
        """Run one step on this rank."""
        run_program(self._program, self._work, Mailbox(self._channels, FORM, CPU), recorder=self._recorder)

    def finish_step(self, number: int) -> None:
        """Write the step's record."""
        channels, spans = self._channels, self._recorder.take_spans()
        append_record(self._records, channels.pipeline_ranks, channels.rank, number, self.table.name, spans)


class TorchContestant(Contestant):
    """A schedule of torch.distributed.pipelining; backwards are split by torch itself."""

    def __init__(self, schedule: str, size: Size, log: SleepLog, layout: Layout) -> None:
        from torch.distributed.pipelining import PipelineStage, schedules

        self.name, rank = f"torch {schedule}", dist.get_rank()
        held, count = layout.stages[rank], layout.last_stage + 1
        example, seconds = make_input(), size.find_sleep(layout.chunks)
        stages = [
            PipelineStage(SleepingStage(log, seconds), index, count, CPU, input_args=(example,), output_args=(example,))
            for index in held
        ]
        given = stages if layout.chunks > 1 else stages[0]
        self._schedule = getattr(schedules, schedule)(given, size.microbatches, loss_fn=_sum, scale_grads=False)
        # A single-chunk schedule has no table to read; torch's 1F1B runs in the common order.
        self.table = build("1f1b", size.ranks, size.microbatches)
        if layout.chunks > 1:
            self.table = _read_torch_table(schedule, self._schedule.pipeline_order)
        first, last = 0 in held, layout.last_stage in held
        self._inputs = [(make_input(),) if first else () for _ in range(size.microbatches)]
        self._targets = [torch.zeros(())] * size.microbatches if last else None

    def step(self) -> None:
        """Run one step on this rank."""
        self._schedule.step(arg_mbs=self._inputs, target_mbs=self._targets, return_outputs=False)


def _read_torch_table(name: str, order: dict[int, list[Any]]) -> ScheduleTable:
    """Return torch's own table: actions print in the notation that tables are read in."""
    text = io.StringIO()
    rows = ([str(action) for action in order[rank] if action is not None and action.is_compute_op] for rank in sorted(order))
    csv.writer(text).writerows(rows)
    return from_csv(text.getvalue(), name)


def _sum(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum()


class MegatronChunk(torch.nn.Module):
    """A sleeping stage behind the face that Megatron's schedules, and the adapter, expect of a model chunk."""

    share_embeddings_and_output_weights = False

    def __init__(self, stage: SleepingStage, config: Any) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.stage, self.config, self.model_type = stage, config, ModelType.encoder_or_decoder
        self._input: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        """Take what the stage before sent; None on the first stage."""
        self._input = tensors[0]

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return nothing: no checkpoint is written."""
        return {}

    def forward(self) -> torch.Tensor:
        """Run the stage on the input that was set."""
        result: torch.Tensor = self.stage(make_input() if self._input is None else self._input)
        return result


class PlatformContestant(Contestant):
    """One who runs on the CPU platform, as Megatron's schedules ask for CUDA."""

    _step: Callable[[], object]

    def step(self) -> None:
        """Run one step on this rank."""
        self._step()


class AdapterContestant(PlatformContestant):
    """This project's schedule under Megatron's forward-backward contract, as a training with ``--cf-schedule`` calls it."""

    def __init__(self, schedule: str, size: Size, log: SleepLog) -> None:
        self.name = f"adapter {schedule}"
        self.table = build(schedule, size.ranks, size.microbatches)
        chunks, is_v = self.table.layout.chunks, self.table.layout.name == "v"
        with on_cpu_platform():
            stages = [SleepingStage(log, size.find_sleep(chunks)) for _ in range(chunks)]
            _, self._step = make_adapter(schedule, stages, size, is_v=is_v)


def make_adapter(
    schedule: str, stages: list[SleepingStage], size: Size, *, is_v: bool, **options: Any
) -> tuple[Any, Callable[[], list[Any]]]:
    """Return ``--cf-schedule``'s `PipelineSchedule` over this rank's stages, and what runs a step of it; on the CPU platform.

    ``options`` are further options of the plugin.
    """
    from megatron.core import parallel_state

    from counterflow.megatron.pipeline.schedule import PipelineSchedule
    from counterflow.megatron.v_layout.model import lay_out_as_v
    from counterflow.options import Options

    if not parallel_state.is_initialized():
        # The adapter asks for the pipeline's ranks where it builds and runs the way back of a V.
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=size.ranks)
    config, groups = make_config(len(stages), size), make_groups(size)

    def build_chunk(vp_stage: int, **place: Any) -> MegatronChunk:
        return MegatronChunk(stages[vp_stage], config)

    build_chunk_in_place = lay_out_as_v(build_chunk) if is_v else build_chunk
    model = [build_chunk_in_place(vp_stage=chunk, pg_collection=groups) for chunk in range(len(stages))]
    run = PipelineSchedule(Options(schedule=schedule, **options))
    return run, partial(run.forward_backward, **describe_step(model, size), pg_collection=groups)


class MegatronContestant(PlatformContestant):
    """Megatron-Core's own 1F1B, or its interleaved schedule with P2P beside the computation where it has that."""

    def __init__(self, chunks: int, size: Size, log: SleepLog) -> None:
        self._chunks, self._size, self._log = chunks, size, log
        self.name = "megatron 1F1B" if chunks == 1 else f"megatron VPP {chunks}"
        self.table = build("interleaved" if chunks > 1 else "1f1b", size.ranks, size.microbatches, **_vpp(chunks))
        with on_cpu_platform():
            self._step = self._prepare()

    def _prepare(self) -> Callable[[], object]:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        config, groups = make_config(self._chunks, self._size), make_groups(self._size)
        seconds = self._size.find_sleep(self._chunks)
        model = [MegatronChunk(SleepingStage(self._log, seconds), config) for _ in range(self._chunks)]
        run = schedules.forward_backward_pipelining_without_interleaving
        if self._chunks > 1:
            run = schedules.forward_backward_pipelining_with_interleaving
        communicator = P2PCommunicator(groups.pp, config)
        return partial(run, **describe_step(model, self._size), p2p_communicator=communicator, pg_collection=groups)


def _vpp(chunks: int) -> dict[str, int]:
    return {"vpp": chunks} if chunks > 1 else {}


def make_config(chunks: int, size: Size) -> Any:
    """Return Megatron's configuration of a model of ``chunks`` sleeping stages a rank."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    interleaved = chunks > 1
    return TransformerConfig(
        num_layers=chunks * size.ranks,
        hidden_size=SHAPE[2],
        num_attention_heads=1,
        pipeline_model_parallel_size=size.ranks,
        virtual_pipeline_model_parallel_size=chunks if interleaved else None,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )


def make_groups(size: Size) -> Any:
    """Return Megatron's process groups: a pipeline over all ranks and nothing else."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    groups.pp = dist.new_group(list(range(size.ranks)), TIMEOUT)
    groups.tp = groups.cp = dist.new_group([dist.get_rank()], TIMEOUT, use_local_synchronization=True)
    return groups


def describe_step(model: list[MegatronChunk], size: Size) -> dict[str, Any]:
    """Return what Megatron's contract and the adapter alike are told of a step."""
    return {
        "forward_step_func": _run_megatron_chunk,
        "data_iterator": [repeat(None)] * len(model),
        "model": model,
        "num_microbatches": size.microbatches,
        "seq_length": SHAPE[0],
        "micro_batch_size": SHAPE[1],
    }


def _run_megatron_chunk(iterator: object, model: MegatronChunk) -> tuple[torch.Tensor, Callable[..., Any]]:
    return model(), _take_loss


def _take_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.sum()
    return loss, {"loss": loss.detach().clone()}  # Megatron divides it in place


class on_cpu_platform:  # noqa: N801
    """Megatron's schedules ask for CUDA; inside the block it means the CPU. Outside nobody else pays for that."""

    def __enter__(self) -> None:
        self._patches: Patches = install_cpu()

    def __exit__(self, *error: object) -> None:
        self._patches.undo()


def enter_platform(contestant: Contestant) -> AbstractContextManager[None]:
    """Return the context that a contestant's step runs in."""
    return on_cpu_platform() if isinstance(contestant, PlatformContestant) else nullcontext()


def list_contestants(size: Size, log: SleepLog, channels: Channels, records: Path) -> list[Contestant]:
    """Return all of them, in the order in which they run."""
    straight, looped, v = lay_straight(size.ranks), lay_looped(size.ranks, 2), lay_v(size.ranks)
    ours = partial(OursContestant, size=size, log=log, channels=channels, records=records)
    return [
        ours("dualpipev"),
        AdapterContestant("dualpipev", size, log),
        TorchContestant("ScheduleDualPipeV", size, log, v),
        ours("zbv"),
        AdapterContestant("zbv", size, log),
        TorchContestant("ScheduleZBVZeroBubble", size, log, v),
        ours("interleaved", vpp=2),
        AdapterContestant("interleaved", size, log),
        TorchContestant("ScheduleInterleaved1F1B", size, log, looped),
        MegatronContestant(2, size, log),
        ours("1f1b"),
        TorchContestant("Schedule1F1B", size, log, straight),
        MegatronContestant(1, size, log),
    ]
