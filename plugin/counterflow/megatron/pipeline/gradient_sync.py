"""Synchronise gradients and parameters between data-parallel ranks, as upstream's schedules do."""

import contextlib
from itertools import pairwise
from typing import Any

from counterflow.megatron.state import of_chunk
from counterflow.schedule import ScheduleTable
from counterflow.schedule.actions import REDUCTION


class GradientSync:
    """Starts the reduction of a chunk's gradients at its R in the table, and parameter gathers before a chunk's first forward."""

    def __init__(self, config: Any, chunks: list[Any], table: ScheduleTable, rank: int, *, forward_only: bool) -> None:
        self._config, self._chunks = config, chunks
        self._layout = table.layout
        self._no_sync: contextlib.ExitStack | None = None
        self._synced: set[int] = set()
        singles = list(table.singles(rank))
        self._first_forward = {s.stage: s.microbatch for s in reversed(singles) if s.kind == "F"}
        # The B's right before the R of their chunk.
        self._completing = {
            (s.stage, s.microbatch)
            for s, following in pairwise(singles)
            if s.kind == "B" and following.kind == REDUCTION and following.stage == s.stage
        }
        started = dict.fromkeys(s.stage for s in singles if s.kind == "F")
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

    def before_forward(self, stage: int, microbatch: int) -> bool:
        """Tell whether this is the chunk's first forward; then start the parameter gather of the next one."""
        is_first = self._first_forward[stage] == microbatch
        if is_first:
            self.start_parameters(1)
        return is_first

    def before_backward(self, stage: int, microbatch: int) -> None:
        """Let gradient hooks start bucket reductions in a B, if the R of its chunk is the next action."""
        if self._config.grad_sync_func is None and (stage, microbatch) in self._completing:
            self.resume()
            self._synced.add(stage)

    def reduce(self, stage: int) -> None:
        """Start the reduction of a chunk's gradients, which are complete; then keep other chunks from starting theirs."""
        self.resume()
        if stage not in self._synced:
            self._start_gradients(stage)
        # Clones (--cf-eplb) send their gradients home now; gradients of experts are reduced once these have arrived.
        if (clones := of_chunk(self._chunks[self._layout.chunk_of(stage)]).clones) is not None:
            clones.start_homecoming()
        self.pause()

    def _start_gradients(self, stage: int) -> None:
        chunk = self._layout.chunk_of(stage)
        if self._config.grad_sync_func is not None:
            _call_for_chunk(self._config.grad_sync_func, chunk, self._chunks)
        elif getattr(getattr(self._chunks[chunk], "ddp_config", None), "overlap_grad_reduce", False):
            # A W completes no backward whose hooks could start the buckets one by one.
            self._chunks[chunk].start_grad_sync()
        self._synced.add(stage)


def _call_for_chunk(function: Any, chunk: int, chunks: list[Any]) -> None:
    """Call Megatron's sync function, which may be a list of one per chunk, with the chunk's parameters."""
    if function is not None:
        (function[chunk] if isinstance(function, list) else function)(chunks[chunk].parameters())
