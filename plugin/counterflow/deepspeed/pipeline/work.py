"""One F and one B of a stage, by the engine's own functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from counterflow.deepspeed.state import graphs_of
from counterflow.runtime.executor import Work
from counterflow.runtime.messages import Message, pack, run_backward, take_gradients, unpack
from counterflow.trainer.layer_chunks import Chunks
from counterflow.trainer.layer_notes import name_once
from counterflow.trainer.splits import note_hooks, start_backward


class DeepSpeedWork(Work):
    """The forwards and backwards of one step of an engine.

    The engine keeps what belongs to a micro-batch in numbered buffers. Here each (stage, micro-batch) has its own. If the table
    spans two replicas (``is_linked``), a chunk runs one half of its micro-batches, ``microbatches`` of them.
    """

    def __init__(self, engine: Any, chunks: Chunks, microbatches: int, *, is_evaluation: bool, is_linked: bool) -> None:
        self._engine, self._chunks, self._microbatches, self._is_evaluation = engine, chunks, microbatches, is_evaluation
        self._graphs: dict[tuple[int, int], tuple[Message, Message, Any, list[Any]]] = {}
        self._splits, self._is_linked = graphs_of[engine.module], is_linked
        engine._reserve_pipe_buffers(microbatches * len(chunks.stages))
        self._buffers = engine.pipe_buffers

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Run the stage by the engine; return what it hands on."""
        engine, buffer, last = self._engine, self._find_buffer(stage, microbatch), self._chunks.layout.last_stage
        self._load(stage, microbatch, buffer)
        if received:
            self._buffers["inputs"][buffer] = unpack(received)
        with engine.run_stage(stage), note_hooks() as hooked:
            engine._exec_forward_pass(buffer)
        outputs = self._take(buffer)
        message = () if stage == last else pack(outputs, stage)
        if not self._is_evaluation:
            self._graphs[stage, microbatch] = received, message, engine.loss if stage == last else None, hooked
        return message

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Run the stage's backward: of the last by the engine, which scales losses; of others from the gradients of outputs."""
        engine = self._engine
        inputs, outputs, loss, hooked = self._graphs.pop((stage, microbatch))
        with engine.run_stage(stage), self._splits.run(stage, self._list_parameters, inputs, hooked):
            if stage != self._chunks.layout.last_stage:
                with _be_in_backward(engine):
                    return run_backward(inputs, outputs, received, start_backward)
            engine.loss = loss
            engine._exec_backward_pass(self._find_buffer(stage, microbatch))
        return take_gradients(inputs)

    def list_layers(self) -> dict[str, torch.nn.Module]:
        """Return the layers of this rank's chunks by their places in the PipelineModule; plain functions and tied layers not."""
        chunks = self._chunks
        starts = zip(chunks.bounds, chunks.functions, strict=True)
        return name_once((str(layer), one) for (start, _), some in starts for layer, one in enumerate(some, start))

    def _list_parameters(self) -> list[torch.Tensor]:
        """Return the parameters of the stage that runs."""
        # A tied layer is a function of its module.
        layers = [one for layer in self._engine.module.forward_funcs for one in (layer, *getattr(layer, "args", ()))]
        return [parameter for layer in layers if isinstance(layer, torch.nn.Module) for parameter in layer.parameters()]

    def _find_buffer(self, stage: int, microbatch: int) -> int:
        return self._chunks.stages.index(stage) * self._microbatches + microbatch % self._microbatches

    def _load(self, stage: int, microbatch: int, buffer: int) -> None:
        """Let the engine draw a micro-batch, once on each rank that needs it: inputs of the first stage, labels of the last."""
        chunks, last = self._chunks, self._chunks.layout.last_stage
        if self._is_linked and stage in (0, last):
            # The two stages on this rank run different micro-batches.
            with self._engine.run_stage(stage):
                self._engine._exec_load_micro_batch(buffer)
            return
        if stage == 0 or (stage == last and not chunks.holds(0)):
            self._engine._exec_load_micro_batch(buffer)
        if stage == 0 and last != 0 and chunks.holds(last):
            labels = self._buffers["labels"]
            labels[self._find_buffer(last, microbatch)], labels[buffer] = labels[buffer], None

    def _take(self, buffer: int) -> Any:
        """Return the output in a buffer, and empty it."""
        outputs = self._buffers["outputs"][buffer]
        for name in ("inputs", "labels", "outputs", "output_tensors"):
            self._buffers[name][buffer] = None
        return outputs


@contextmanager
def _be_in_backward(engine: Any) -> Iterator[None]:
    """Do around the backward of a stage that is not the last what the engine does around its own."""
    if engine.using_bf16_optimizer:
        engine.optimizer.clear_lp_grads()
    engine._running_engine_backward = True
    try:
        yield
    finally:
        engine._running_engine_backward = False
    if engine.using_bf16_optimizer:
        engine.optimizer.update_hp_grads(clear_lp_grads=False)
    # The hooks that the forward put on the outputs have started them; upstream starts them twice, which it then refuses.
    for name in (*engine.engine_timers.backward_inner_timers, *engine.engine_timers.backward_timers):
        if engine.timers(name).started_:
            engine.timers(name).stop()
