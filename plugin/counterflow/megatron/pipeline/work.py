"""Run one F or B of a (stage, micro-batch) with Megatron's own step functions, and collect losses and token counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules as upstream
from torch.utils._pytree import tree_map

from counterflow.megatron.pipeline.gradient_sync import GradientSync
from counterflow.megatron.pipeline.prediction_log import add_prediction_losses, take_prediction_losses
from counterflow.megatron.pipeline.zero_bubble import defer_engine_weight_grads
from counterflow.megatron.v_layout.mirror import run_mirrored
from counterflow.megatron.v_layout.model import WAY_BACK, unwrap
from counterflow.runtime.messages import Message
from counterflow.runtime.weight_grads import is_holding
from counterflow.schedule import ScheduleTable
from counterflow.schedule.layouts import V
from counterflow.trainer.tables import name_model_layout


@dataclass
class Step:
    """The arguments of one call of `forward_backward`, and the losses and token counts that its forwards collect."""

    forward_step_func: Callable[..., Any]
    data_iterators: list[Any]
    chunks: list[Any]
    config: Any
    table: ScheduleTable
    microbatches: int
    """Micro-batches of this replica: those of the table, half of them where the table spans two replicas."""
    cp_size: int
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    losses: list[Any]
    num_tokens: torch.Tensor


class _Chunk(NamedTuple):
    """The model chunk of a stage: its index on the rank, the model, and the script's ``forward_step`` for it."""

    place: int
    model: Any
    forward_step_func: Callable[..., Any]


class MegatronWork:
    """One F or B of a (stage, micro-batch) by upstream's step functions; a message of Megatron's stages is one tensor."""

    def __init__(self, step: Step, sync: GradientSync) -> None:
        self._step, self._sync = step, sync
        self._layout = step.table.layout
        self._chunks: dict[int, _Chunk] = {}
        self._inputs: dict[tuple[int, int], torch.Tensor | None] = {}
        self._outputs: dict[tuple[int, int], torch.Tensor] = {}

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Run a forward; losses and token counts of the last stage are kept in the step."""
        tensor = take_tensor(received)
        is_first = self._prepare_forward(stage, microbatch, tensor)
        output, num_tokens = self._forward_step(stage, microbatch, tensor, is_first)
        if output is tensor:
            # A stage without layers. Its output is freed once it is sent, its input not.
            output = output.clone()
        self._keep(stage, microbatch, tensor, output, num_tokens)
        return (output,)

    def _prepare_forward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> bool:
        """Return whether this is the chunk's first forward."""
        is_first = self._sync.before_forward(stage, microbatch)
        if received is not None:
            received.requires_grad_(not self._step.forward_only)
        return is_first

    def _forward_step(
        self, stage: int, microbatch: int, received: torch.Tensor | None, is_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run upstream's ``forward_step``; return the output and the number of tokens."""
        step, chunk = self._step, self._find_chunk(stage)
        output, num_tokens = upstream.forward_step(
            chunk.forward_step_func,
            step.data_iterators[chunk.place],
            chunk.model,
            step.microbatches,
            received,
            step.losses,
            step.config,
            cp_group_size=step.cp_size,
            collect_non_loss_data=step.collect_non_loss_data,
            is_first_microbatch=upstream.check_first_val_step(step.first_val_step, step.forward_only, is_first),
            # If the table spans two replicas, a chunk runs one half of the table's micro-batches.
            current_microbatch=microbatch % step.microbatches,
            vp_stage=chunk.place if self._layout.chunks > 1 else None,
            is_last_stage=stage == self._layout.last_stage,
        )
        return output, num_tokens

    def _find_chunk(self, stage: int) -> _Chunk:
        """Return the stage's chunk, found once per step: Python calls between two actions delay the pipeline."""
        if stage not in self._chunks:
            step, place = self._step, self._layout.chunk_of(stage)
            function = run_mirrored(step.forward_step_func) if self._is_mirrored(stage) else step.forward_step_func
            self._chunks[stage] = _Chunk(place, step.chunks[place], function)
        return self._chunks[stage]

    def _is_mirrored(self, stage: int) -> bool:
        return name_model_layout(self._layout) == V and self._layout.chunk_of(stage) == WAY_BACK

    def _keep(
        self, stage: int, microbatch: int, received: torch.Tensor | None, output: torch.Tensor, num_tokens: torch.Tensor
    ) -> None:
        if stage == self._layout.last_stage:  # elsewhere upstream counts none
            self._step.num_tokens += num_tokens.to(self._step.num_tokens.device)
        if not self._step.forward_only:
            self._inputs[stage, microbatch] = received
            self._outputs[stage, microbatch] = output

    def release_output(self, stage: int, microbatch: int) -> None:
        """Free the output's data as upstream does (``deallocate_pipeline_outputs``)."""
        if not self._step.forward_only:
            free = self._step.config.deallocate_pipeline_outputs
            # The CPU platform's mode need not inspect these seven calls.
            with torch._C.DisableTorchFunction():
                upstream.deallocate_output_tensor(self._outputs[stage, microbatch], free)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Run a backward; where it leaves weight gradients for later, no gradient hook may start a reduction."""
        if not is_holding():
            self._sync.before_backward(stage, microbatch)
        return (self._backward_step(stage, microbatch, take_tensor(received)),)

    def _backward_step(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """Run upstream's ``backward_step``."""
        gradient: torch.Tensor | None = upstream.backward_step(
            self._inputs.pop((stage, microbatch)), self._outputs.pop((stage, microbatch)), received, self._step.config
        )
        defer_engine_weight_grads(self._find_chunk(stage).model)
        return gradient

    def leave_weight_grads(self, stage: int) -> None:
        """Hand over what Transformer Engine's modules keep."""
        defer_engine_weight_grads(self._find_chunk(stage).model)

    def finish_backward(self, stage: int, microbatch: int) -> None:
        """Keep backwards from starting reductions; a chunk's reduction starts with its R."""
        self._sync.pause()

    def reduce(self, stage: int) -> None:
        """Start the reduction of the chunk's gradients."""
        self._sync.reduce(stage)

    def list_layers(self) -> dict[str, torch.nn.Module]:
        """Return the layers of this rank's chunks by Megatron's numbers, those of multi-token prediction as ``mtp 1``."""
        layers = {}
        for chunk in self._step.chunks:
            model = unwrap(chunk)
            for name, prefix in (("decoder", ""), ("mtp", "mtp ")):
                for layer in getattr(getattr(model, name, None), "layers", ()):
                    layers[f"{prefix}{layer.layer_number}"] = layer
        return layers


def take_tensor(message: Message) -> torch.Tensor | None:
    """Return the one tensor of a message; None for an empty message."""
    return message[0] if message else None


def move_to_last_rank(step: Step, pp_group: Any, rank: int) -> None:
    """Send losses and token counts from the rank that computed them to the last pipeline rank, where Megatron reads them.

    A V ends on pipeline rank 0. So does each of two cross-linked replicas: it has the losses of its partner, which does not
    change the sum over replicas. The losses of multi-token prediction, which upstream gathers for its log, are sent too. On a GPU
    this waits for the losses once per step (untested on GPU).
    """
    layout, target = step.table.layout, pp_group.size() - 1
    source = next(r for r in range(pp_group.size()) if layout.last_stage in layout.stages[r])
    if source == target:
        return
    ranks = dist.get_process_group_ranks(pp_group)
    device = step.num_tokens.device
    if rank == source:
        payload = [step.losses, step.num_tokens, take_prediction_losses()]
        payload = tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, payload)
        dist.send_object_list(payload, ranks[target], group=pp_group, device=device)
        step.losses = []
    elif rank == target:
        received: list[Any] = [None, None, None]
        dist.recv_object_list(received, ranks[source], group=pp_group, device=device)
        step.losses, step.num_tokens, predicted = tree_map(lambda v: v.to(device) if torch.is_tensor(v) else v, received)
        add_prediction_losses(predicted)
