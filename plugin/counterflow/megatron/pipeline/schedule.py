"""Megatron's forward-backward contract over the executor.

`forward_backward` takes the place of upstream's pipelined schedules. Each F and B is upstream's own
``forward_step`` or ``backward_step``; gradient and parameter syncs, token counts, timers and the
gradient finaliser are called as upstream's schedules call them.
"""

from collections.abc import Callable
from datetime import timedelta
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules as upstream
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from counterflow.errors import OptionError
from counterflow.megatron.loop import number_iteration
from counterflow.megatron.pipeline.crosslink import link_pipelines
from counterflow.megatron.pipeline.gradient_sync import GradientSync
from counterflow.megatron.pipeline.overlap import OverlapWork
from counterflow.megatron.pipeline.work import MegatronWork, Step, move_to_last_rank
from counterflow.megatron.pipeline.zero_bubble import watch_reductions
from counterflow.megatron.v_layout.embeddings import add_embedding_gradients
from counterflow.options import AUTO, Options
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import Program, lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.recorder import Recorder, append_record
from counterflow.runtime.watch import Watch, find_store
from counterflow.schedule import ScheduleTable, build_forward_only
from counterflow.schedule.layouts import V
from counterflow.trainer.auto import AutoTable
from counterflow.trainer.tables import build_table, choose_layout, count_replicas, name_model_layout


class PipelineSchedule:
    """`forward_backward` with the options it runs under; keeps what it has opened and lowered."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._zero_bubble = options.zero_bubble is not False
        self._tables: dict[tuple[int, bool], ScheduleTable] = {}
        self._programs: dict[tuple[bool, int], Program] = {}
        self._channels: Channels | None = None
        self._watch: Watch | None = None
        self._auto: AutoTable | None = None
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
        # Some loops make Megatron's own and hand it on; it does nothing that is not done here.
        if adjust_tensor_shapes_fn is not None or type(p2p_communicator) not in (NoneType, P2PCommunicator):
            raise OptionError(
                "--cf-schedule moves tensors itself: adjust_tensor_shapes_fn must be None, p2p_communicator None or Megatron's "
                "P2PCommunicator"
            )
        chunks = model if isinstance(model, list) else [model]
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        config = get_model_config(chunks[0])
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        rank = groups.pp.rank()
        device = torch.device(torch.cuda.current_device())
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

        channels, watch = self._open(groups.pp, len(chunks), device)
        table = self._choose_table(groups.pp.size(), num_microbatches, len(chunks), config, forward_only)
        program = self._lower(table, channels, forward_only, device)
        step = Step(
            forward_step_func, iterators, chunks, config, table, num_microbatches, groups.cp.size(), forward_only,
            collect_non_loss_data, first_val_step, [], torch.zeros([], dtype=torch.int, device=device),
        )  # fmt: skip
        (shape,) = upstream.get_tensor_shapes(
            seq_length=seq_length, micro_batch_size=micro_batch_size, decoder_seq_length=decoder_seq_length,
            config=config, tp_group=groups.tp, cp_group=groups.cp,
        )  # fmt: skip
        # An MTP layer on a stage of its own hands on its output beside its input: longer than what it was given.
        varies = config.variable_seq_lengths or getattr(config, "mtp_standalone", False)
        mailbox = Mailbox(channels, None if varies else tuple(shape), config.pipeline_dtype, device)
        iteration = number_iteration(self._training_steps, forward_only=forward_only)
        watch.begin(iteration, is_evaluation=forward_only)
        if forward_only:
            run_program(program, MegatronWork(step, self._make_sync(step, channels)), mailbox, watch=watch)
        else:
            self._train(step, program, channels, mailbox, watch, iteration)
        move_to_last_rank(step, groups.pp, rank)

        if config.finalize_model_grads_func is not None and not forward_only:
            tokens = step.num_tokens if config.calculate_per_token_loss else None
            config.finalize_model_grads_func(chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
            if name_model_layout(table.layout) == V:
                add_embedding_gradients(chunks)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return step.losses

    def _train(self, step: Step, program: Program, channels: Channels, mailbox: Mailbox, watch: Watch, iteration: int) -> None:
        measured = self._auto is not None and self._auto.is_measuring
        is_recorded = measured or self._options.record is not None
        recorder = Recorder(channels.rank, step.num_tokens.is_cuda) if is_recorded else None
        sync = self._make_sync(step, channels)
        work = OverlapWork(step, sync) if self._options.overlap else MegatronWork(step, sync)
        if self._training_steps == 0:
            watch_reductions(step.chunks)
        sync.pause()
        sync.start_parameters(1)
        run_program(program, work, mailbox, zero_bubble=self._zero_bubble, recorder=recorder, watch=watch)
        sync.resume()
        spans = recorder.take_spans() if recorder is not None else []
        if self._auto is not None and measured:
            self._auto.note(spans)
        if self._options.record is not None:
            name = program.table.name
            append_record(self._options.record, channels.pipeline_ranks, channels.rank, iteration, name, spans)
        self._training_steps += 1

    def _make_sync(self, step: Step, channels: Channels) -> GradientSync:
        return GradientSync(step.config, step.chunks, step.table, channels.rank, forward_only=step.forward_only)

    def _choose_table(self, ranks: int, microbatches: int, chunks: int, config: Any, forward_only: bool) -> ScheduleTable:
        if self._auto is not None and not forward_only:
            return self._auto.choose(microbatches, number_iteration(self._training_steps))
        key = (microbatches, forward_only)
        if key not in self._tables and forward_only:
            layout = choose_layout(self._options, ranks, chunks)
            self._tables[key] = build_forward_only(layout, count_replicas(layout) * microbatches)
        elif key not in self._tables:
            group = getattr(config, "microbatch_group_size_per_vp_stage", None)
            self._tables[key] = build_table(self._options, ranks, microbatches, chunks, group)
        return self._tables[key]

    def _lower(self, table: ScheduleTable, channels: Channels, forward_only: bool, device: torch.device) -> Program:
        key = forward_only, table.digest
        if key not in self._programs:
            self._programs[key] = lower(table, channels.rank)
            channels.connect(self._programs[key], device)
        return self._programs[key]

    def _open(self, pp_group: Any, chunks: int, device: torch.device) -> tuple[Channels, Watch]:
        if self._channels is None or self._watch is None:
            # New groups wait for half an hour by default; these are to wait as long as Megatron's own.
            timeout = pp_group._get_backend(device).options._timeout
            if self._options.stall_limit is not None:
                timeout = timedelta(seconds=self._options.stall_limit)
            ranks, rank = dist.get_process_group_ranks(pp_group), pp_group.rank()
            if count_replicas(choose_layout(self._options, len(ranks), chunks)) > 1:
                ranks, rank = link_pipelines(ranks)
            self._channels = Channels(ranks, rank, timeout)
            self._watch = Watch(find_store(), ranks, rank, timeout.total_seconds())
            if self._options.schedule == AUTO:
                self._auto = AutoTable(pp_group, device, has_pairs=self._options.overlap, splits=self._zero_bubble)
        return self._channels, self._watch
