"""Megatron's forward-backward contract, run by the executor.

`PipelineSchedule.forward_backward` replaces upstream's pipelined schedules. Each F and B is upstream's own ``forward_step`` or
``backward_step``. Gradient and parameter syncs, token counts, timers and the gradient finaliser are called as upstream's
schedules call them.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules as upstream
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from counterflow.devices import find_device
from counterflow.errors import OptionError
from counterflow.megatron.loop import number_iteration
from counterflow.megatron.pipeline.gradient_sync import GradientSync
from counterflow.megatron.pipeline.work import MegatronWork, Step, move_to_last_rank
from counterflow.megatron.pipeline.zero_bubble import watch_reductions
from counterflow.megatron.streams import count_streams
from counterflow.megatron.v_layout.embeddings import add_embedding_gradients
from counterflow.options import Options
from counterflow.runtime.handover import Carried
from counterflow.runtime.lowering import Program
from counterflow.runtime.messages import Form, Member
from counterflow.schedule.layouts import V
from counterflow.trainer.crosslink import link_pipelines
from counterflow.trainer.pipeline import Pipeline
from counterflow.trainer.tables import name_model_layout


class PipelineSchedule:
    """`forward_backward` under the options of a run."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._pipeline: Pipeline | None = None
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
        # Some loops pass Megatron's own communicator; it is not used.
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
        device = find_device()
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

        if self._pipeline is None:
            carried = self._list_carried()
            self._pipeline = Pipeline(self._options, groups.pp, len(chunks), device, _link_pipelines, carried)
        pipeline, iteration = self._pipeline, number_iteration(self._training_steps, forward_only=forward_only)
        group = getattr(config, "microbatch_group_size_per_vp_stage", None)
        table = pipeline.choose_table(num_microbatches, iteration, forward_only=forward_only, group=group)
        step = Step(
            forward_step_func, iterators, chunks, config, table, num_microbatches, groups.cp.size(), forward_only,
            collect_non_loss_data, first_val_step, [], torch.zeros([], dtype=torch.int, device=device),
        )  # fmt: skip
        (narrow,) = upstream.get_tensor_shapes(
            seq_length=seq_length, micro_batch_size=micro_batch_size, decoder_seq_length=decoder_seq_length,
            config=config, tp_group=groups.tp, cp_group=groups.cp,
        )  # fmt: skip
        # An MTP layer on a stage of its own sends its output together with its input, which is longer than what it received.
        varies = config.variable_seq_lengths or getattr(config, "mtp_standalone", False)
        shape = None if varies else (*narrow[:-1], narrow[-1] * count_streams(config))
        form = (Member(shape, config.pipeline_dtype),)
        program = pipeline.prepare(table, form, forward_only=forward_only)
        if forward_only:
            pipeline.evaluate(program, MegatronWork(step, self._make_sync(step, pipeline)), form, iteration)
        else:
            self._train(step, pipeline, program, form, iteration)
        move_to_last_rank(step, groups.pp, rank)

        if config.finalize_model_grads_func is not None and not forward_only:
            tokens = step.num_tokens if config.calculate_per_token_loss else None
            config.finalize_model_grads_func(chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
            if name_model_layout(table.layout) == V:
                add_embedding_gradients(chunks)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return step.losses

    def _train(self, step: Step, pipeline: Pipeline, program: Program, form: Form, iteration: int) -> None:
        sync = self._make_sync(step, pipeline)
        work = MegatronWork(step, sync)
        if self._training_steps == 0:
            watch_reductions(step.chunks)
        sync.pause()
        sync.start_parameters(1)
        pipeline.train(program, work, form, iteration)
        sync.resume()
        self._training_steps += 1

    def _list_carried(self) -> list[Carried]:
        if not self._options.overlap:
            return []
        # A Megatron without what pairs need stops runs with pairs alone, so the import is here.
        from counterflow.megatron.pipeline.overlap import list_carried

        return list_carried()

    def _make_sync(self, step: Step, pipeline: Pipeline) -> GradientSync:
        return GradientSync(step.config, step.chunks, step.table, pipeline.rank, forward_only=step.forward_only)


def _link_pipelines(pipeline: list[int]) -> tuple[list[int], int]:
    return link_pipelines(pipeline, parallel_state.get_data_parallel_group())
