"""Run F and B by Megatron's layer schedule plans (``--cf-overlap``): in a pair, all-to-alls of one hide behind the other.

Upstream's ``combined_forward_backward_step`` takes a forward and a backward of two model chunks and issues their nodes
(attention, dispatch, experts, combine) alternately to a compute and a communication stream. An F then leaves a plan for its B,
instead of an autograd graph of the whole chunk. So an F or a B outside a pair is run by a plan too.

In a pair, the deferred weight gradients of a layer's experts and attention (`defer_weight_grad`) run in upstream's
``backward_dw``. It comes after the input gradients, so the next all-to-all need not wait for them.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import combined_1f1b
from megatron.core.pipeline_parallel.utils import ScheduleNode, set_streams

from counterflow.devices import make_event
from counterflow.errors import OptionError, SeamError
from counterflow.megatron.pipeline.gradient_sync import GradientSync
from counterflow.megatron.pipeline.work import MegatronWork, Step, take_tensor
from counterflow.megatron.v_layout.mirror import hold_mirrored_rank
from counterflow.runtime.messages import Message
from counterflow.runtime.weight_grads import defer_weight_grad, hold_weight_grads
from counterflow.schedule.actions import Action


class _Forward(NamedTuple):
    """An F, its input, and whether it is the chunk's first F of the step."""

    stage: int
    microbatch: int
    received: torch.Tensor | None
    is_first: bool


class _Backward(NamedTuple):
    """A B or I, and the gradient of its output."""

    stage: int
    microbatch: int
    received: torch.Tensor | None


class PairNodes:
    """The layer nodes of the pair that runs now, each with its deferred weight gradients."""

    def __init__(self) -> None:
        self._waiting: dict[Any, list[Callable[[], None]]] | None = None

    @property
    def are_open(self) -> bool:
        """Whether a pair runs now."""
        return self._waiting is not None

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Let nodes defer weight gradients to their ``backward_dw`` inside the block; raises if upstream omits a call of it."""
        self._waiting = {}
        try:
            yield
            if self._waiting:
                names = ", ".join(node.name for node in self._waiting)
                raise RuntimeError(f"upstream did not call backward_dw on {names}: their weight gradients would be lost")
        finally:
            self._waiting = None

    def hold_in_node(self, backward_impl: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a layer node's backward: in a pair, the weight gradients that it defers wait for the node's ``backward_dw``."""

        @wraps(backward_impl)
        def run_and_hold(node: Any, *args: Any) -> Any:
            # Upstream calls `backward_dw` only on nodes that have modules for it.
            if self._waiting is None or not node.bwd_dw_callables:
                return backward_impl(node, *args)
            with hold_weight_grads() as held:
                result = backward_impl(node, *args)
            self._waiting[node] = held
            return result

        return run_and_hold

    def run_held(self, backward_dw: Callable[[Any], None]) -> Callable[[Any], None]:
        """Wrap a layer node's ``backward_dw``: in a pair, the node's deferred weight gradients run there, on its stream."""

        @wraps(backward_dw)
        def run_both(node: Any) -> None:
            if self._waiting is None:
                # Weight gradients of Transformer Engine's modules (untested on GPU): at once in a B, at the W in an I.
                if node.delay_wgrad_compute:
                    defer_weight_grad(partial(backward_dw, node))
                return
            if node.bwd_dw_callables:
                # A node with an event of its own runs on the stream, after all that was issued to the stream before.
                event = make_event()
                compute = partial(self._compute, node)
                ScheduleNode(compute, node.stream, event, name=f"{node.name} weight gradients").forward()
            backward_dw(node)

        return run_both

    def _compute(self, node: Any) -> tuple[()]:
        assert self._waiting is not None
        for fn in self._waiting.pop(node):
            fn()
        return ()


class OverlapWork(MegatronWork):
    """One F, one B, or an overlapped pair of both, by upstream's schedule plans."""

    def __init__(self, step: Step, sync: GradientSync, nodes: PairNodes) -> None:
        super().__init__(step, sync)
        self._nodes = nodes
        require_schedule_plans(step.forward_step_func)
        # Before 0.18 the communication stream has no priority.
        priority = {"high_priority": getattr(step.config, "high_priority_a2a_comm_stream", False)}
        set_streams(**(priority if "high_priority" in inspect.signature(set_streams).parameters else {}))

    def forward_backward(
        self, forward: Action, received: Message, backward: Action, gradient: Message
    ) -> tuple[Message, Message]:
        """Run the pair's F and B overlapped; return the F's output and the B's input gradient.

        Deferred weight gradients run after the gradient hooks of their layer, so no hook may start a reduction here. After the
        chunk's last backward, the R of the chunk starts all of them.
        """
        tensor = take_tensor(received)
        is_first = self._prepare_forward(forward.stage, forward.microbatch, tensor)
        f = _Forward(forward.stage, forward.microbatch, tensor, is_first)
        b = _Backward(backward.stage, backward.microbatch, take_tensor(gradient))
        with self._nodes.defer():
            output, num_tokens, input_gradient = self._run_plans(f, b)
        self._keep(*f[:3], output, num_tokens)
        return (output,), (input_gradient,)

    def release_output(self, stage: int, microbatch: int) -> None:
        """Free the output's data, unless it is a loss: the plan's backward still needs that one number."""
        if stage != self._layout.last_stage:
            super().release_output(stage, microbatch)

    def _forward_step(
        self, stage: int, microbatch: int, received: torch.Tensor | None, is_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, num_tokens, _ = self._run_plans(_Forward(stage, microbatch, received, is_first), None)
        return output, num_tokens

    def _backward_step(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        return self._run_plans(None, _Backward(stage, microbatch, received))[2]

    def _run_plans(self, f: _Forward | None, b: _Backward | None) -> tuple[Any, Any, torch.Tensor | None]:
        """Return the F's output and token count and the B's input gradient; None for those of an F or B that is None."""
        # An F's nodes and its loss may ask where in the pipeline they are; a B's nodes do not.
        with hold_mirrored_rank() if f is not None and self._is_mirrored(f.stage) else nullcontext():
            result = combined_1f1b.combined_forward_backward_step(**self._describe_plans(f, b))
        if not isinstance(result, tuple) or len(result) != 3:
            raise SeamError(
                f"{combined_1f1b.__name__}.combined_forward_backward_step of this megatron-core does not return the F's output, "
                "its token count and the B's input gradient: drop --cf-overlap"
            )
        output, num_tokens, gradient = result
        return output, num_tokens, gradient

    def _describe_plans(self, f: _Forward | None, b: _Backward | None) -> dict[str, Any]:
        """Return upstream's arguments by name: newer versions have more of them, in another order."""
        step, layout = self._step, self._layout
        f_chunk = layout.chunk_of(f.stage) if f is not None else None
        key = (b.stage, b.microbatch) if b is not None else None
        return {
            "forward_step_func": step.forward_step_func,
            "data_iterator": step.data_iterators[f_chunk] if f_chunk is not None else None,
            "f_model": step.chunks[f_chunk] if f_chunk is not None else None,
            "num_microbatches": step.microbatches,
            "input_tensor": f.received if f is not None else None,
            "forward_data_store": step.losses,
            "b_model": step.chunks[layout.chunk_of(b.stage)] if b is not None else None,
            "b_input_tensor": self._inputs.pop(key) if key is not None else None,
            "b_output_tensor": self._outputs.pop(key) if key is not None else None,
            "b_output_tensor_grad": b.received if b is not None else None,
            "config": step.config,
            "f_model_chunk_id": f_chunk if layout.chunks > 1 else None,
            "is_first_microbatch": f is not None and f.is_first,
            "current_microbatch": f.microbatch % step.microbatches if f is not None else None,
        }


def require_schedule_plans(forward_step_func: Callable[..., Any]) -> None:
    """Raise `OptionError` unless the script's ``forward_step`` can return a schedule plan."""
    parameters = inspect.signature(forward_step_func).parameters.values()
    if not any(p.name == "return_schedule_plan" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        name = getattr(forward_step_func, "__name__", "forward_step")
        raise OptionError(
            f"--cf-overlap needs a {name}(data_iterator, model, return_schedule_plan=False) that returns "
            "model.build_schedule_plan(…) in place of the output when asked, as Megatron's pretrain_gpt.py does; the script's "
            f"{name} does not take return_schedule_plan: add it or drop --cf-overlap"
        )
