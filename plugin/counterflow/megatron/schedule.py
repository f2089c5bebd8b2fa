"""Megatron's forward-backward contract over the executor.

`forward_backward` takes the place of upstream's pipelined schedules. Each F and B is upstream's own
``forward_step`` or ``backward_step``; gradient and parameter syncs, token counts, timers and the
gradient finaliser are called as upstream's schedules call them.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules as upstream
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from counterflow.config import Options
from counterflow.errors import OptionError
from counterflow.megatron.embeddings import add_embedding_gradients
from counterflow.megatron.gradient_sync import GradientSync
from counterflow.megatron.tables import build_table, choose_layout
from counterflow.megatron.work import MegatronWork, Step, move_to_last_rank
from counterflow.megatron.zero_bubble import watch_reductions
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import Program, lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.recorder import Recorder
from counterflow.runtime.watch import Watch, find_store
from counterflow.schedule import build_forward_only
from counterflow.schedule.layouts import V


class PipelineSchedule:
    """`forward_backward` with the options it runs under; keeps the tables it has built."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._programs: dict[tuple[int, bool], Program] = {}
        self._channels: Channels | None = None
        self._recorder: Recorder | None = None
        self._watch: Watch | None = None
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
        program = self._lower(channels, num_microbatches, chunks, config, forward_only, device)
        step = Step(
            forward_step_func, iterators, chunks, config, program.table, groups.cp.size(), forward_only,
            collect_non_loss_data, first_val_step, [], torch.zeros([], dtype=torch.int, device=device),
        )  # fmt: skip
        (shape,) = upstream.get_tensor_shapes(
            seq_length=seq_length, micro_batch_size=micro_batch_size, decoder_seq_length=decoder_seq_length,
            config=config, tp_group=groups.tp, cp_group=groups.cp,
        )  # fmt: skip
        # An MTP layer on a stage of its own hands on its output beside its input: longer than what it was given.
        varies = config.variable_seq_lengths or getattr(config, "mtp_standalone", False)
        mailbox = Mailbox(channels, None if varies else tuple(shape), config.pipeline_dtype, device)
        self._run(step, program, channels, mailbox)
        move_to_last_rank(step, groups.pp, rank)

        if config.finalize_model_grads_func is not None and not forward_only:
            tokens = step.num_tokens if config.calculate_per_token_loss else None
            config.finalize_model_grads_func(chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
            if program.table.layout.name == V:
                add_embedding_gradients(chunks)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return step.losses

    def _run(self, step: Step, program: Program, channels: Channels, mailbox: Mailbox) -> None:
        zero_bubble = self._options.zero_bubble is not False
        sync = GradientSync(
            step.config, step.chunks, program.table, channels.rank, zero_bubble=zero_bubble, forward_only=step.forward_only
        )
        work = MegatronWork(step, sync)
        watch = self._open_watch(channels)
        watch.begin(self._training_steps)
        if step.forward_only:
            run_program(program, work, mailbox, watch=watch)
            return
        recorder = self._open_recorder(channels)
        sync.pause()
        sync.start_parameters(1)
        run_program(program, work, mailbox, zero_bubble=zero_bubble, recorder=recorder, watch=watch)
        sync.finish()
        if recorder is not None:
            recorder.write_step(self._training_steps, program.table.name)
        self._training_steps += 1

    def _lower(
        self, channels: Channels, microbatches: int, chunks: list[Any], config: Any, forward_only: bool, device: torch.device
    ) -> Program:
        key, ranks = (microbatches, forward_only), len(channels.pipeline_ranks)
        if key not in self._programs:
            if forward_only:
                table = build_forward_only(choose_layout(self._options, ranks, len(chunks)), microbatches)
            else:
                group = getattr(config, "microbatch_group_size_per_vp_stage", None)
                table = build_table(self._options, ranks, microbatches, len(chunks), group)
                watch_reductions(chunks)
            self._programs[key] = lower(table, channels.rank)
            channels.connect(self._programs[key], device)
        return self._programs[key]

    def _open_channels(self, pp_group: Any) -> Channels:
        if self._channels is None:
            # New groups wait for half an hour by default; these are to wait as long as Megatron's own.
            timeout = pp_group._get_backend(torch.device(torch.cuda.current_device())).options._timeout
            if self._options.stall_limit is not None:
                timeout = timedelta(seconds=self._options.stall_limit)
            self._channels = Channels(dist.get_process_group_ranks(pp_group), pp_group.rank(), timeout)
        return self._channels

    def _open_watch(self, channels: Channels) -> Watch:
        if self._watch is None:
            self._watch = Watch(find_store(), channels.pipeline_ranks, channels.rank)
        return self._watch

    def _open_recorder(self, channels: Channels) -> Recorder | None:
        if self._options.record is None:
            return None
        if self._recorder is None:
            on_gpu = torch.device(torch.cuda.current_device()).type == "cuda"
            self._recorder = Recorder(self._options.record, channels.pipeline_ranks, channels.rank, on_gpu)
        return self._recorder
