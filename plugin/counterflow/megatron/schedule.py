"""Megatron's forward-backward contract over the executor.

`forward_backward` takes the place of upstream's pipelined schedules. Each F and B is upstream's own
``forward_step`` or ``backward_step``; gradient and parameter syncs, token counts, timers and the
gradient finaliser are called as upstream's schedules call them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules as upstream
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch.utils._pytree import tree_map

from counterflow.config import Options
from counterflow.errors import OptionError
from counterflow.megatron.mirror import run_mirrored
from counterflow.megatron.model import WAY_BACK
from counterflow.runtime.executor import run_row
from counterflow.runtime.mailbox import Channels, Mailbox, TransferPlan
from counterflow.runtime.recorder import Recorder
from counterflow.schedule import ScheduleTable, build, build_forward_only, lay_looped, lay_straight, lay_v, read_csv, validate
from counterflow.schedule.layouts import LOOPED, STRAIGHT, Layout, V


def choose_layout(options: Options, ranks: int, chunks: int) -> Layout:
    """Return the layout that the named schedule, or the file's table, runs on."""
    if options.schedule_file is not None:
        layout = read_csv(options.schedule_file).layout
        if layout.name not in (STRAIGHT, LOOPED, V):
            raise OptionError(
                f"--cf-schedule {options.schedule_file} is a table on the {layout.name} layout; this version builds Megatron "
                f"models on {STRAIGHT}, {LOOPED} and {V} layouts: give a table on one of them"
            )
        return layout
    if options.schedule == "dualpipev":
        return lay_v(ranks)
    return lay_looped(ranks, chunks) if chunks > 1 else lay_straight(ranks)


def build_table(options: Options, ranks: int, microbatches: int, chunks: int, group: int | None = None) -> ScheduleTable:
    """Build and validate the training table for these sizes; a file's table must have them."""
    if options.schedule_file is not None:
        table = read_csv(options.schedule_file)
        given = (table.ranks, table.microbatches, table.layout.chunks)
        if given != (ranks, microbatches, chunks):
            raise OptionError(
                f"--cf-schedule {options.schedule_file} is a table for {given[0]} pipeline ranks, {given[1]} micro-batches "
                f"and {given[2]} chunks per rank; this run has {ranks}, {microbatches} and {chunks}"
            )
        _require_rising_forwards(table)
    else:
        sizes = {"vpp": chunks, "group": group} if options.schedule == "interleaved" else {}
        assert options.schedule is not None
        table = build(options.schedule, ranks, microbatches, **{k: v for k, v in sizes.items() if v is not None})
    validate(table)
    return table


def _require_rising_forwards(table: ScheduleTable) -> None:
    # Each chunk draws micro-batches from its own data iterator, in order.
    for rank in range(table.ranks):
        reached: dict[int, int] = {}
        for single in table.singles(rank):
            if single.kind == "F" and single.microbatch != reached.setdefault(single.stage, 0):
                raise OptionError(
                    f"{table.name}: rank {rank}: {single} is out of order; each stage takes micro-batches 0, 1, 2, …"
                )
            if single.kind == "F":
                reached[single.stage] += 1


@dataclass
class _Step:
    """What one call of `forward_backward` was given, and what its forwards gather."""

    forward_step_func: Callable[..., Any]
    data_iterators: list[Any]
    chunks: list[Any]
    config: Any
    table: ScheduleTable
    cp_size: int
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    losses: list[Any]
    num_tokens: torch.Tensor


class _GradientSync:
    """When gradients and parameters are synchronised: from a chunk's last backward, to its first forward."""

    def __init__(self, step: _Step, rank: int) -> None:
        self._config, self._chunks = step.config, step.chunks
        self._layout = step.table.layout
        self._no_sync: contextlib.ExitStack | None = None
        self._synced: set[int] = set()
        self._last_backward = {s.stage: s.microbatch for s in step.table.singles(rank) if s.kind in "BI"}
        started = dict.fromkeys(s.stage for s in step.table.singles(rank) if s.kind == "F")
        self._parameters_due = [] if step.forward_only else list(started)

    def pause(self) -> None:
        """Keep gradient reductions from starting."""
        if self._no_sync is None:
            no_sync = self._config.no_sync_func or contextlib.nullcontext
            self._no_sync = contextlib.ExitStack()
            for function in no_sync if isinstance(no_sync, list) else [no_sync]:
                self._no_sync.enter_context(function())

    def resume(self) -> None:
        """Let gradient reductions start."""
        if self._no_sync is not None:
            self._no_sync.close()
            self._no_sync = None

    def start_parameters(self, count: int) -> None:
        """Start the parameter gather of the next ``count`` chunks to run forward."""
        for stage in self._parameters_due[:count]:
            _call_for_chunk(self._config.param_sync_func, self._layout.chunk_of(stage), self._chunks)
        del self._parameters_due[:count]

    def before_backward(self, stage: int, microbatch: int) -> None:
        """In a chunk's last backward, bucket reductions start from the gradient hooks themselves."""
        if self._config.grad_sync_func is None and self._last_backward[stage] == microbatch:
            self.resume()
            self._synced.add(stage)

    def after_backward(self, stage: int, microbatch: int) -> None:
        """After a chunk's last backward, start its reduction where the trainer wants it started by call."""
        if self._config.grad_sync_func is not None and self._last_backward[stage] == microbatch:
            self._start_gradients(stage)
        self.pause()

    def finish(self) -> None:
        """Start the reductions of chunks that have not been started."""
        self.resume()
        for stage in self._last_backward:
            if self._config.grad_sync_func is not None and stage not in self._synced:
                self._start_gradients(stage)

    def _start_gradients(self, stage: int) -> None:
        self.resume()
        _call_for_chunk(self._config.grad_sync_func, self._layout.chunk_of(stage), self._chunks)
        self._synced.add(stage)


def _call_for_chunk(function: Any, chunk: int, chunks: list[Any]) -> None:
    """Call Megatron's sync function, one or one per chunk, with the chunk's parameters."""
    if function is not None:
        (function[chunk] if isinstance(function, list) else function)(chunks[chunk].parameters())


class _MegatronWork:
    """One F or B of a (stage, micro-batch) with upstream's step functions."""

    def __init__(self, step: _Step, sync: _GradientSync) -> None:
        self._step, self._sync = step, sync
        self._layout = step.table.layout
        self._inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        self._outputs: dict[tuple[int, int], torch.Tensor] = {}

    def forward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        step, chunk = self._step, self._layout.chunk_of(stage)
        if microbatch == 0:
            self._sync.start_parameters(1)
        if received is not None:
            received.requires_grad_(not step.forward_only)
        mirrored = self._layout.name == V and chunk == WAY_BACK
        output: torch.Tensor
        output, num_tokens = upstream.forward_step(
            run_mirrored(step.forward_step_func) if mirrored else step.forward_step_func,
            step.data_iterators[chunk],
            step.chunks[chunk],
            step.table.microbatches,
            received,
            step.losses,
            step.config,
            cp_group_size=step.cp_size,
            collect_non_loss_data=step.collect_non_loss_data,
            is_first_microbatch=upstream.check_first_val_step(step.first_val_step, step.forward_only, microbatch == 0),
            current_microbatch=microbatch,
            vp_stage=chunk if self._layout.chunks > 1 else None,
            is_last_stage=stage == self._layout.last_stage,
        )
        step.num_tokens += num_tokens.to(step.num_tokens.device)
        if not step.forward_only:
            self._inputs[stage, microbatch] = received
            self._outputs[stage, microbatch] = output
        return output

    def release_output(self, stage: int, microbatch: int) -> None:
        if not self._step.forward_only:
            free = self._step.config.deallocate_pipeline_outputs
            upstream.deallocate_output_tensor(self._outputs[stage, microbatch], free)

    def backward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        self._sync.before_backward(stage, microbatch)
        gradient: torch.Tensor | None = upstream.backward_step(
            self._inputs.pop((stage, microbatch)), self._outputs.pop((stage, microbatch)), received, self._step.config
        )
        self._sync.after_backward(stage, microbatch)
        return gradient


class PipelineSchedule:
    """`forward_backward` with the options it runs under; keeps the tables it has built."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._plans: dict[tuple[int, bool], TransferPlan] = {}
        self._channels: Channels | None = None
        self._recorder: Recorder | None = None
        self._training_steps = 0

    def forward_backward(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Run all forwards and backwards of one step; the arguments and the result are upstream's.

        Returns the loss dictionaries, one per micro-batch, on the last pipeline rank; [] elsewhere.
        """
        if adjust_tensor_shapes_fn is not None or p2p_communicator is not None:
            raise OptionError("--cf-schedule moves tensors itself: adjust_tensor_shapes_fn and p2p_communicator must be None")
        chunks = model if isinstance(model, list) else [model]
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        config = get_model_config(chunks[0])
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        rank = groups.pp.rank()
        device = torch.device(torch.cuda.current_device())
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

        channels = self._open_channels(groups.pp)
        plan = self._plan(channels, num_microbatches, len(chunks), config, forward_only, device)
        step = _Step(
            forward_step_func, iterators, chunks, config, plan.table, groups.cp.size(), forward_only,
            collect_non_loss_data, first_val_step, [], torch.zeros([], dtype=torch.int, device=device),
        )  # fmt: skip
        (shape,) = upstream.get_tensor_shapes(
            seq_length=seq_length, micro_batch_size=micro_batch_size, decoder_seq_length=decoder_seq_length,
            config=config, tp_group=groups.tp, cp_group=groups.cp,
        )  # fmt: skip
        mailbox = Mailbox(channels, plan, tuple(shape), config.pipeline_dtype, device)
        self._run(step, channels, mailbox)
        move_to_last_rank(step, groups.pp, rank)

        if config.finalize_model_grads_func is not None and not forward_only:
            tokens = step.num_tokens if config.calculate_per_token_loss else None
            config.finalize_model_grads_func(chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return step.losses

    def _run(self, step: _Step, channels: Channels, mailbox: Mailbox) -> None:
        rank = channels.rank
        recorder = None if step.forward_only else self._open_recorder(channels)
        sync = _GradientSync(step, rank)
        work = _MegatronWork(step, sync)
        if step.forward_only:
            run_row(step.table, rank, work, mailbox)
            return
        sync.pause()
        sync.start_parameters(1)
        run_row(step.table, rank, work, mailbox, recorder)
        sync.finish()
        if recorder is not None:
            recorder.write_step(self._training_steps, step.table.name)
        self._training_steps += 1

    def _plan(
        self, channels: Channels, microbatches: int, chunks: int, config: Any, forward_only: bool, device: torch.device
    ) -> TransferPlan:
        key, ranks = (microbatches, forward_only), len(channels.pipeline_ranks)
        if key not in self._plans:
            if forward_only:
                table = build_forward_only(choose_layout(self._options, ranks, chunks), microbatches)
            else:
                group = getattr(config, "microbatch_group_size_per_vp_stage", None)
                table = build_table(self._options, ranks, microbatches, chunks, group)
            self._plans[key] = TransferPlan(table)
            channels.connect(self._plans[key], device)
        return self._plans[key]

    def _open_channels(self, pp_group: Any) -> Channels:
        if self._channels is None:
            # New groups wait for half an hour by default; these are to wait as long as Megatron's own.
            timeout = pp_group._get_backend(torch.device(torch.cuda.current_device())).options._timeout
            self._channels = Channels(dist.get_process_group_ranks(pp_group), pp_group.rank(), timeout)
        return self._channels

    def _open_recorder(self, channels: Channels) -> Recorder | None:
        if self._options.record is None:
            return None
        if self._recorder is None:
            on_gpu = torch.device(torch.cuda.current_device()).type == "cuda"
            self._recorder = Recorder(self._options.record, channels.pipeline_ranks, channels.rank, on_gpu)
        return self._recorder


def move_to_last_rank(step: _Step, pp_group: Any, rank: int) -> None:
    """Hand losses and token counts from the rank that computed them to the one that Megatron reads.

    A V ends on pipeline rank 0; Megatron's loop reads losses, and broadcasts token counts, from the
    last rank. On a GPU this waits for the losses once per step (untested on GPU).
    """
    layout = step.table.layout
    source, target = layout.rank_of[layout.last_stage], layout.ranks - 1
    if source == target:
        return
    ranks = dist.get_process_group_ranks(pp_group)
    device = step.num_tokens.device
    if rank == source:
        payload = tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, [step.losses, step.num_tokens])
        dist.send_object_list(payload, ranks[target], group=pp_group, device=device)
        step.losses = []
    elif rank == target:
        received: list[Any] = [None, None]
        dist.recv_object_list(received, ranks[source], group=pp_group, device=device)
        step.losses, step.num_tokens = tree_map(lambda v: v.to(device) if torch.is_tensor(v) else v, received)
