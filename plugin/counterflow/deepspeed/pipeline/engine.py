"""DeepSpeed's pipeline engine with a table in place of its instructions.

The engine stays upstream's: data loading, loss aggregation, `train_batch`, `eval_batch`, timers and monitors. Where upstream
makes a schedule, this engine makes a `Step`. Where upstream runs instructions, the executor runs the table of the step; then the
reductions and the optimizer step follow, as upstream's own instructions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from counterflow.deepspeed.pipeline.overlap import list_carried
from counterflow.deepspeed.pipeline.work import DeepSpeedWork
from counterflow.deepspeed.pipeline.zero_bubble import split_model
from counterflow.deepspeed.state import chunks_of
from counterflow.options import AUTO
from counterflow.sections import speaking_json
from counterflow.trainer.crosslink import Partner, link_pipelines
from counterflow.trainer.norms import clip_by_norm
from counterflow.trainer.pipeline import Pipeline

# Where DeepSpeed sends shapes once, so do tables.
REMEDY = (
    "make the PipelineModule with dynamic_shape=True, or call reset_activation_shape() of the engine on every rank before a step "
    "with other shapes"
)


class Step(NamedTuple):
    """A step that is due, where upstream has a list of instructions."""

    microbatches: int
    is_evaluation: bool


def clip_by_whole_norm(model: Any, grid: Any, most: float) -> float:
    """Scale the gradients in ``.grad`` such that their norm over all ranks of a replica is at most ``most``; return the norm."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.utils import is_model_parallel_parameter
    from deepspeed.utils import groups

    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    counted: dict[str | None, list[torch.Tensor]] = {}
    for parameter in trained:
        # Of a tied layer, and of what all tensor-parallel ranks hold, one copy counts.
        is_first = grid.get_slice_parallel_rank() == 0 or is_model_parallel_parameter(parameter)
        if is_moe_param(parameter):
            counted.setdefault(parameter.group_name, []).append(parameter.grad)
        elif is_first and not getattr(parameter, "ds_pipe_replicated", False):
            counted.setdefault(None, []).append(parameter.grad)
    sharded = [(own, groups._get_expert_parallel_group(name) if name else None) for name, own in counted.items()]
    return clip_by_norm([one.grad for one in trained], sharded, grid.get_model_parallel_group(), most)


@cache
def make_engine_class(base: Any) -> Any:
    """Return a subclass of DeepSpeed's pipeline engine that runs tables."""

    class TableEngine(base):  # type: ignore[misc]
        """A pipeline engine whose model holds chunks."""

        def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
            # While upstream connects ranks, first and last stage mean the first and last rank.
            self._chunks, self._is_connecting = chunks_of[model], True
            self.running_stage: int | None = None
            super().__init__(*args, model=model, **kwargs)
            self._is_connecting = False
            # Messages go whole, so that they may have any members.
            self.is_pipe_partitioned = self.is_grad_partitioned = False
            chunks = self._chunks
            group = self.grid.get_pipe_parallel_group()
            replicas = self.grid.get_data_parallel_group()
            link = partial(link_pipelines, replicas=replicas)
            carried = list_carried(self) if chunks.chosen.options.overlap else ()
            self._pipeline = Pipeline(chunks.chosen.options, group, chunks.layout.chunks, self.device, link, carried)
            # On a rank with both ends of cross-linked replicas: the one to which this replica's losses go, and the micro-batches
            # that are still to be loaded, by stage.
            self._partner: Partner | None = None
            self._dealt: dict[int | None, list[Any]] = {}
            if self._pipeline.is_linked and chunks.holds(0):
                self._partner = Partner(replicas, self._pipeline.timeout)
            if chunks.chosen.options.schedule != AUTO:
                # What the table refuses is refused before the first step.
                self._pipeline.choose_table(self.micro_batches, 1)
            split_model(self)

        @contextmanager
        def run_stage(self, stage: int) -> Iterator[None]:
            """Let the engine and the model be of one stage inside the block."""
            before = self.running_stage
            self.set_stage(stage)
            try:
                yield
            finally:
                self.running_stage = before

        def set_stage(self, stage: int | None) -> None:
            """Let the engine and the model be of one stage, or of none in particular."""
            self.running_stage = stage
            if stage is not None:
                self.module.activate(self._chunks.stages.index(stage))

        def is_first_stage(self) -> bool:
            """Tell whether the stage that runs, or else one on this rank, is the first."""
            return self._is_stage(0, 0)

        def is_last_stage(self) -> bool:
            """Tell whether the stage that runs, or else one on this rank, is the last."""
            return self._is_stage(self._chunks.layout.last_stage, self.num_stages - 1)

        def _is_stage(self, stage: int, rank: int) -> bool:
            if self._is_connecting:
                return bool(self.stage_id == rank)
            return self._chunks.holds(stage) if self.running_stage is None else self.running_stage == stage

        def _loss_stage_global_rank(self) -> int:
            return int(self.grid.stage_to_global(self._chunks.layout.rank_of[self._chunks.layout.last_stage]))

        def clip_fp32_gradients(self) -> None:
            """Clip by the norm of the whole model; upstream counts only the first model-parallel rank's part of it."""
            self._global_grad_norm = clip_by_whole_norm(self.module, self.grid, self.gradient_clipping())

        def _train_schedule(self) -> Step:
            return Step(self.micro_batches, is_evaluation=False)

        def _inference_schedule(self, micro_batches: int) -> Step:
            return Step(micro_batches, is_evaluation=True)

        @speaking_json()
        def _exec_schedule(self, step: Step) -> None:
            self.fwd_outputs: list[Any] = []
            self._due, self._dealt = step.microbatches, {}
            if step.is_evaluation:
                # Upstream adds to what the last training step left; logits, with compute_loss=False, do not fit that.
                self.total_loss = self.total_additional_losses = None
            work = DeepSpeedWork(
                self, self._chunks, step.microbatches, is_evaluation=step.is_evaluation, is_linked=self._pipeline.is_linked
            )
            remedy = None if self.dynamic_shape else REMEDY
            self._pipeline.run_announced(work, step.microbatches, self.global_steps + 1, remedy, forward_only=step.is_evaluation)
            if self._partner is not None:
                self._swap_losses(self._partner)
            if not step.is_evaluation:
                self._exec_reduce_tied_grads()
                self._exec_reduce_grads()
                self._exec_optimizer_step()

        def reset_activation_shape(self) -> None:
            """Let the next step announce shapes anew."""
            super().reset_activation_shape()
            self._pipeline.forget_forms()

        def _next_batch(self) -> Any:
            if self._partner is None:
                return super()._next_batch()
            if not self._dealt:
                both = self._partner.deal(super()._next_batch, self._due)
                self._dealt = dict(zip((0, self._chunks.layout.last_stage), both, strict=True))
            return self._dealt[self.running_stage].pop(0)

        def _swap_losses(self, partner: Partner) -> None:
            """Give the partner the losses and outputs of its micro-batches, which this rank's last stage computed."""
            names = ("total_loss", "total_additional_losses", "fwd_outputs", "outputs")
            for name, value in zip(names, partner.swap([getattr(self, name) for name in names], self.device), strict=True):
                setattr(self, name, value)

    return TableEngine
