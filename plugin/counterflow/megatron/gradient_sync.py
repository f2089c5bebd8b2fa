"""When gradients and parameters are synchronised between data-parallel ranks, as upstream's schedules do it."""

import contextlib
from typing import Any

from counterflow.schedule import ScheduleTable


class GradientSync:
    """When gradients and parameters are synchronised: from a chunk's last backward, to its first forward."""

    def __init__(self, config: Any, chunks: list[Any], table: ScheduleTable, rank: int, forward_only: bool) -> None:
        self._config, self._chunks = config, chunks
        self._layout = table.layout
        self._no_sync: contextlib.ExitStack | None = None
        self._synced: set[int] = set()
        self._last_backward = {s.stage: s.microbatch for s in table.singles(rank) if s.kind in "BI"}
        started = dict.fromkeys(s.stage for s in table.singles(rank) if s.kind == "F")
        self._parameters_due = [] if forward_only else list(started)

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
