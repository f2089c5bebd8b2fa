"""Overlapped pairs by hand-over: the F and the B of a pair are two flows that share the rank.

One flow computes at a time. Where it has issued a communication (`counterflow.runtime.communication`) it hands the rank to the
other flow; it goes on when the other has handed it back, and then waits for what is left of its transfer. Both follow from the
model's code alone, never from the clock: the B begins, and every communication hands over. So all expert-parallel ranks, which
run the same pair, issue their collectives in one order. A flow that ends leaves the rank to the other.

Weight gradients that the B defers run behind its next communication, before it hands over; those behind its last one when the F
has issued one more, if it has one more.

Each flow has a thread: the F the caller's, the B one that lasts as long as `HandOver`. So grad mode, autocast, current stream,
saved-tensor hooks and annotations of a profiler are each flow's own. On a GPU autograd runs the B's functions on a thread of its
own; nothing here asks which thread it is, since only the flow that has the rank runs. What is global in a process (random
numbers, a trainer's variables) is `Carried`: each flow finds its own when it gets the rank back.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from counterflow.devices import capture_random, find_device, get_stream, issue_to, restore_random
from counterflow.runtime.recorder import Recorder
from counterflow.runtime.weight_grads import hold_weight_grads
from counterflow.schedule.actions import Action

# How long an interrupted pair waits for its other flow, which may stand in a transfer that never ends.
PATIENCE = 5.0


@dataclass(frozen=True)
class Carried:
    """State of the process that goes with its flow: it is captured where a flow hands over, and restored where it goes on.

    Both flows find what was there before the pair; where ``begin`` is given, the B begins with what it returns. After the pair
    the F's is in force.
    """

    capture: Callable[[], Any]
    restore: Callable[[Any], None]
    begin: Callable[[], Any] | None = None


class Ended(BaseException):
    """Ends a flow whose other flow has failed. No handler of an `Exception` is to stop it."""


class Region(Protocol):
    """The communication that a flow is in the middle of issuing (`counterflow.runtime.communication`)."""

    def add(self, start: Callable[[], Any], output: torch.Tensor) -> None:
        """Take up a collective."""

    def close(self, returned: Sequence[Any]) -> None:
        """Hand over and wait."""

    def wait_for(self, finish: Callable[[], Any]) -> None:
        """Hand over, then wait by ``finish`` for what has been issued already."""


class Flow:
    """An action as it runs: how many communications it has issued, and whether it waits for the last of them."""

    def __init__(self, action: Action, shared: "HandOver", leave: Callable[[], None] | None = None) -> None:
        self.action, self.count, self.waits, self.name = action, 0, False, ""
        self.region: Region | None = None
        self.other: Flow | None = None
        self.has_ended = self.is_cancelled = False
        self.held: list[Callable[[], None]] = []
        self._shared, self._leave = shared, leave
        self._turn = threading.Lock()
        self._turn.acquire()

    def communicate(self, start: Callable[[], Any], finish: Callable[[Any], Any], name: str = "") -> Any:
        """Issue a transfer by ``start``, let the other flow run, and return ``finish`` of what ``start`` returned."""
        recorder = self._shared.recorder
        self.count, self.name = self.count + 1, name
        begun = recorder.mark() if recorder is not None else None
        handle = start()
        arrivals = recorder.watch(handle) if recorder is not None else None
        self.compute_held()
        self.hand_over()
        resumed = recorder.mark() if recorder is not None else None
        self.waits = True
        result = finish(handle)
        self.waits = False
        if recorder is not None and arrivals is not None:
            recorder.note(self.action, begun, resumed, arrivals)
        return result

    def compute_held(self) -> None:
        """Compute the weight gradients that the B has deferred so far."""
        if self._leave is not None:
            self._leave()
        while self.held:
            self.held.pop(0)()

    def expects_more(self) -> bool:
        """Tell whether this action had more communications in its first run."""
        return not self.has_ended and self.count < self._shared.counts.get((self.action.kind, self.action.stage), 0)

    def hand_over(self) -> None:
        """Let the other flow run until it hands the rank back or ends; returns at once where there is none."""
        if self.is_cancelled:
            raise Ended
        if self.other is None or self.other.has_ended:
            return
        values = self._shared.capture()
        self.other.wake()
        self.wait()
        self._shared.restore(values)

    def wake(self) -> None:
        """Give this flow the rank."""
        global _running
        if self._shared.recorder is not None and self.other is not None:
            self._shared.recorder.change_turn()
        _running = self
        self._turn.release()

    def wait(self) -> None:
        """Wait for the rank."""
        self._turn.acquire()
        if self.is_cancelled:
            raise Ended

    def cancel(self) -> None:
        """End the flow: where it waits for the rank, or where it hands over next."""
        self.is_cancelled = True
        if self._turn.locked():
            self._turn.release()

    def __str__(self) -> str:
        if not self.count:
            return f"{self.action} before its first communication"
        where = "waiting for" if self.waits else "behind"
        return f"{self.action} {where} communication {self.count}{f' ({self.name})' if self.name else ''}"


# The flow that has the rank. One of the process, not of a thread: autograd may run a flow's backward on threads of its own.
_running: Flow | None = None


def find_flow() -> Flow | None:
    """Return the flow that has the rank; None outside of what `HandOver` runs."""
    return _running


class HandOver:
    """Runs the actions of one rank as flows: single ones by themselves, the parts of a pair in turn.

    ``carried`` is what the trainer keeps in global variables; random numbers are carried anyway.
    """

    def __init__(self, carried: Sequence[Carried] = ()) -> None:
        device = find_device()
        randomness = Carried(lambda: capture_random(device), lambda state: restore_random(device, state))
        self._carried = (randomness, *carried)
        self.recorder: Recorder | None = None
        self.counts: dict[tuple[str, int], int] = {}
        """Communications of a kind of action on a stage, as counted in its first run."""
        self._flows: tuple[Flow, ...] = ()
        self._helper: _Helper | None = None

    def describe(self) -> str:
        """Return where the flows of the running action stand, "" where there are none; another thread may ask."""
        return ", ".join(map(str, self._flows))

    def list_counts(self) -> list[tuple[int, int, int]]:
        """Return (stage, communications of its F, of its B or I), for each stage that has run."""
        stages = sorted({stage for _, stage in self.counts})
        backward = {stage: count for (kind, stage), count in self.counts.items() if kind in "BI"}
        return [(stage, self.counts.get(("F", stage), 0), backward.get(stage, 0)) for stage in stages]

    def capture(self) -> list[Any]:
        """Return what is carried, as it is now."""
        return [one.capture() for one in self._carried]

    def restore(self, values: list[Any]) -> None:
        """Put what is carried in force."""
        for one, value in zip(self._carried, values, strict=True):
            one.restore(value)

    @contextmanager
    def run_single(self, action: Action) -> Iterator[None]:
        """Run the action inside the block as a flow without another."""
        with self._keep(Flow(action, self)) as (flow,):
            flow.wake()
            yield

    def run_pair(
        self,
        forward: Action,
        run_forward: Callable[[], object],
        backward: Action,
        run_backward: Callable[[], object],
        leave: Callable[[], None] | None = None,
    ) -> None:
        """Run both parts of a pair in turn, the F on this thread; returns when both have ended.

        ``leave`` hands what the trainer's modules keep of weight gradients to `defer_weight_grad`. An error in one part ends the
        other and is raised as it came.
        """
        with self._keep(Flow(forward, self), Flow(backward, self, leave)) as (f, b):
            f.other, b.other = b, f
            values, done = self.capture(), _Done()
            try:
                self._start(b, run_backward, done)
                f.wait()
                self.restore(values)
                run_forward()
                values, f.has_ended = self.capture(), True
                if not b.has_ended:
                    b.wake()
                done.event.wait()
            except BaseException as failure:
                f.has_ended = True
                self._cancel(b, done)
                if not isinstance(failure, Ended):
                    raise
            finally:
                self.restore(values)
            if done.error is not None:
                raise done.error

    @contextmanager
    def _keep(self, *flows: Flow) -> Iterator[tuple[Flow, ...]]:
        global _running
        if _running is not None:
            raise RuntimeError(f"{_running.action} runs already: actions do not run inside actions")
        self._flows = flows
        try:
            yield flows
        finally:
            _running = None
        # After an error `describe` still says where they stood.
        for flow in flows:
            self.counts.setdefault((flow.action.kind, flow.action.stage), flow.count)
        self._flows = ()

    def _start(self, b: Flow, run_backward: Callable[[], object], done: "_Done") -> None:
        """Give the rank to the B, on its thread."""
        if self._helper is None:
            self._helper = _Helper()
            weakref.finalize(self, self._helper.queue.put, None)
        for one in self._carried:
            if one.begin is not None:
                one.restore(one.begin())
        b.wake()
        run = partial(_run_backward, b, run_backward, _inherit(), done)
        self._helper.queue.put(partial(copy_context().run, run))

    def _cancel(self, b: Flow, done: "_Done") -> None:
        """End the B; one that does not end in time is left behind with its thread."""
        helper, self._helper = self._helper, None
        b.cancel()
        if done.event.wait(PATIENCE):
            self._helper = helper


class _Done:
    """Whether the B has ended, and with which error."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: BaseException | None = None


def _run_backward(b: Flow, run: Callable[[], object], inherited: AbstractContextManager[Any], done: _Done) -> None:
    """Run the B of a pair; what it has deferred at its end waits for the F's next communication."""
    f = b.other
    assert f is not None
    try:
        b.wait()
        with inherited, hold_weight_grads() as b.held:
            run()
        if f.expects_more():
            b.hand_over()
        b.compute_held()
    except Ended:
        pass
    except BaseException as error:
        done.error = error
        f.is_cancelled = True
    finally:
        b.has_ended = True
        if not f.has_ended:
            f.wake()
        done.event.set()


@contextmanager
def _take_over(enters: list[AbstractContextManager[Any]], modes: list[Any]) -> Iterator[None]:
    """Put another thread's settings in force on this one."""
    with ExitStack() as stack:
        for one in enters:
            stack.enter_context(one)
        for mode in modes:
            _push_mode(mode)  # type: ignore[no-untyped-call]
            stack.callback(_pop_mode)
        yield


def _inherit() -> AbstractContextManager[Any]:
    """Return a context manager for another thread, under which it has the settings that torch keeps for this one."""
    enters: list[AbstractContextManager[Any]] = [torch.set_grad_enabled(torch.is_grad_enabled()), issue_to(get_stream())]
    casting = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    enters += [torch.autocast(device, torch.get_autocast_dtype(device)) for device in casting]
    return _take_over(enters, _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


class _Helper:
    """A thread that runs what it is given until it is given None."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(self.queue,), daemon=True, name="counterflow backward").start()


def _serve(queue: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (run := queue.get()) is not None:
        run()
        del run  # while the thread waits, nothing is to be kept alive by it
