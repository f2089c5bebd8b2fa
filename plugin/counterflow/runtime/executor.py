"""Run one rank's program, for any model.

The trainer supplies `Work`: a forward and a backward of one (stage, micro-batch). The program has the order of actions. The
mailbox moves messages between ranks. The executor itself keeps two things from one action to a later one: messages between two
stages of the same rank (at the turn of a V), and the weight-gradient work that an I leaves for its W.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, runtime_checkable

from counterflow.errors import ScheduleError
from counterflow.runtime.handover import HandOver
from counterflow.runtime.lowering import Instruction, Part, Program
from counterflow.runtime.mailbox import Mailbox
from counterflow.runtime.messages import Message, share
from counterflow.runtime.recorder import Recorder
from counterflow.runtime.watch import Watch
from counterflow.runtime.weight_grads import hold_weight_grads
from counterflow.schedule.actions import PAIR, REDUCTION, Action
from counterflow.schedule.dependencies import Result


class Work(Protocol):
    """What a trainer does for one (stage, micro-batch)."""

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the stage's output; ``received`` is its input, () on the first stage.

        A member of ``received`` needs a gradient if the sender's did.
        """

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the gradients of the input's members (`messages.run_backward`).

        ``received`` are the gradients of the output's members, () on the last stage. In an I, functions passed to
        `defer_weight_grad` run at the W.
        """

    def finish_backward(self, stage: int, microbatch: int) -> None:
        """Called when all weight gradients of this (stage, micro-batch) are computed; by default does nothing."""
        return

    def reduce(self, stage: int) -> None:
        """Start the reduction of the stage's gradients, which runs beside later actions; by default does nothing."""
        return

    def release_output(self, stage: int, microbatch: int) -> None:
        """Called when the output has been sent; its data may be freed. By default does nothing."""
        return


@runtime_checkable
class KeepingWork(Protocol):
    """Work whose stages' modules keep weight gradients of their own accord."""

    def leave_weight_grads(self, stage: int) -> None:
        """Hand what they keep to `defer_weight_grad`; is called where the B of an overlapped pair hands over."""


class Annotations(Protocol):
    """What notes the actions in a profiler's trace, around what they compute."""

    def annotate(self, action: Action) -> AbstractContextManager[Any]:
        """Note an action; the block in it runs when its input has arrived."""

    def annotate_part(self, single: Action) -> AbstractContextManager[Any]:
        """Note one part of a pair, on the thread that computes it."""


def run_program(
    program: Program,
    work: Work,
    mailbox: Mailbox,
    *,
    recorder: Recorder | None = None,
    watch: Watch | None = None,
    handover: HandOver | None = None,
    annotations: Annotations | None = None,
) -> None:
    """Run the program's instructions in order.

    The parts of a pair run one after the other, or, with ``handover``, in turn: one computes where the other communicates. If an
    action raises, ``watch`` tells the other ranks, and the error that is raised names the action. ``annotations`` are entered
    around what computes.
    """
    run = _Run(work, mailbox, recorder, handover, annotations)
    if watch is not None:
        watch.mailbox, watch.handover = mailbox, handover
    try:
        for position, instruction in enumerate(program.instructions):
            if watch is not None:
                watch.enter(position, instruction)
            run.run_instruction(instruction)
        mailbox.finish()
        run.require_empty()
    except Exception as error:
        if watch is not None:
            raise watch.explain(error) from error
        raise


class _Run:
    """One run of a program, with the messages and weight-gradient work that wait for a later action."""

    def __init__(
        self,
        work: Work,
        mailbox: Mailbox,
        recorder: Recorder | None,
        handover: HandOver | None,
        annotations: Annotations | None,
    ) -> None:
        self._work, self._mailbox, self._recorder, self._handover = work, mailbox, recorder, handover
        self._annotations = annotations
        if handover is not None:
            handover.recorder = recorder
        self._kept: dict[Result, Message] = {}
        self._queues: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def run_instruction(self, instruction: Instruction) -> None:
        """Run one action: its inputs, its work, its results."""
        # First the recorder, which may wait for the device: a receive that is posted may need what another rank computes later.
        if self._recorder is not None:
            self._recorder.start(instruction.action)
        self._mailbox.post(instruction.posts)
        if instruction.action.kind == PAIR and self._handover is not None:
            self._run_pair(self._handover, instruction.action, *instruction.parts)
        else:
            for part in instruction.parts:
                with self._handover.run_single(part.single) if self._handover is not None else nullcontext():
                    self._run_part(part)
        if self._recorder is not None:
            self._recorder.stop()

    def _run_part(self, part: Part) -> None:
        kind, stage, microbatch = part.single.kind, part.single.stage, part.single.microbatch
        if kind == REDUCTION:
            self._work.reduce(stage)
            return
        received = self._fetch(part)
        self._begin_compute()
        with self._annotations.annotate(part.single) if self._annotations is not None else nullcontext():
            self._compute(part, kind, stage, microbatch, received)

    def _compute(self, part: Part, kind: str, stage: int, microbatch: int, received: Message) -> None:
        if kind == "F":
            self._hand_on(part, self._work.forward(stage, microbatch, received))
            self._work.release_output(stage, microbatch)
        elif kind == "I":
            with hold_weight_grads() as queue:
                gradient = self._work.backward(stage, microbatch, received)
            self._queues[stage, microbatch] = queue
            self._hand_on(part, gradient)
        elif kind == "W":
            for compute in self._queues.pop((stage, microbatch)):
                compute()
            self._work.finish_backward(stage, microbatch)
        else:
            self._hand_on(part, self._work.backward(stage, microbatch, received))
            self._work.finish_backward(stage, microbatch)

    def _run_pair(self, handover: HandOver, action: Action, forward: Part, backward: Part) -> None:
        """Run both parts in turn. The F's output leaves when the F has ended, the B's gradient after it: so they are received."""
        f, b = forward.single, backward.single
        received, gradient = self._fetch(forward), self._fetch(backward)
        self._begin_compute()
        gradients: list[Message] = []

        notes = self._annotations

        def run_forward() -> None:
            with notes.annotate_part(f) if notes is not None else nullcontext():
                self._hand_on(forward, self._work.forward(f.stage, f.microbatch, received))
                self._work.release_output(f.stage, f.microbatch)

        def run_backward() -> None:
            with notes.annotate_part(b) if notes is not None else nullcontext():
                gradients.append(self._work.backward(b.stage, b.microbatch, gradient))

        leave = partial(self._work.leave_weight_grads, b.stage) if isinstance(self._work, KeepingWork) else None
        with notes.annotate(action) if notes is not None else nullcontext():
            handover.run_pair(f, run_forward, b, run_backward, leave)
            self._hand_on(backward, gradients.pop())
            self._work.finish_backward(b.stage, b.microbatch)

    def _fetch(self, part: Part) -> Message:
        if part.receive is not None:
            return self._mailbox.receive(part.receive, part.delivered)
        return self._kept.pop(part.take) if part.take is not None else ()

    def _hand_on(self, part: Part, result: Message) -> None:
        if part.send is None and part.keep is None:
            return
        if not isinstance(result, tuple):
            raise ScheduleError(f"{part.single} gave a {type(result).__name__}; a message is a tuple of tensors, if only of one")
        for member in result:
            if member is not None:
                break
        else:
            raise ScheduleError(f"{part.single} gave nothing to send on; is all of stage {part.single.stage} frozen?")
        if part.send is not None:
            self._mailbox.send(part.send, result)
        if part.keep is not None:
            self._kept[part.keep] = share(result)

    def _begin_compute(self) -> None:
        if self._recorder is not None:
            self._recorder.begin_compute()

    def require_empty(self) -> None:
        """Raise if a weight gradient was never computed; the optimizer would not notice."""
        if self._queues:
            stage, microbatch = next(iter(self._queues))
            raise ScheduleError(f"the weight gradients of stage {stage}, micro-batch {microbatch} were never computed")
