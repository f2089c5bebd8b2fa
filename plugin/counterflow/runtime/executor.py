"""Run one rank's row of a schedule table. Knows stages and tensors, not whose model it runs.

The trainer supplies `Work`: a forward and a backward of one (stage, micro-batch). The table says when;
the mailbox moves what crosses ranks; what stays on the rank (the turn of a V) is handed over here.
"""

from typing import Protocol

import torch

from counterflow.errors import ScheduleError
from counterflow.runtime.mailbox import Mailbox
from counterflow.runtime.recorder import Recorder
from counterflow.schedule.actions import Action
from counterflow.schedule.dependencies import Result, find_input, find_receiver, find_result
from counterflow.schedule.table import ScheduleTable


class Work(Protocol):
    """What a trainer does for one (stage, micro-batch)."""

    def forward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        """Return the stage's output; ``received`` is the input, None on the first stage."""

    def backward(self, stage: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """Return the input gradient; ``received`` is the output's gradient, None on the last stage."""

    def release_output(self, stage: int, microbatch: int) -> None:
        """The output has been handed on: its data may be freed."""


def run_row(table: ScheduleTable, rank: int, work: Work, mailbox: Mailbox, recorder: Recorder | None = None) -> None:
    """Run ``table.actions[rank]`` from left to right.

    Overlapped pairs run one part after the other. Without a zero-bubble split, an I runs as a whole
    B and its W does nothing.
    """
    local: dict[Result, torch.Tensor] = {}
    for action in table.actions[rank]:
        if recorder is not None:
            recorder.start(action)
        for single in action.singles():
            if single.kind != "W":
                _run_single(table, rank, single, work, mailbox, local, recorder)
        if recorder is not None:
            recorder.stop()
    mailbox.finish()


def _run_single(
    table: ScheduleTable,
    rank: int,
    single: Action,
    work: Work,
    mailbox: Mailbox,
    local: dict[Result, torch.Tensor],
    recorder: Recorder | None,
) -> None:
    source = find_input(single, table.layout.last_stage)
    received = None
    if source is not None:
        received = local.pop(source) if source in local else mailbox.receive(source)
    if recorder is not None:
        recorder.begin_compute()
    if single.kind == "F":
        result: torch.Tensor | None = work.forward(single.stage, single.microbatch, received)
    else:
        result = work.backward(single.stage, single.microbatch, received)
    message, receiver = find_result(single), find_receiver(table, single)
    if message is not None and receiver is not None:
        if result is None:
            raise ScheduleError(f"{single} gave nothing to send on; is all of stage {single.stage} frozen?")
        if receiver == rank:
            local[message] = result.detach()
        else:
            mailbox.send(message, receiver, result)
    if single.kind == "F":
        work.release_output(single.stage, single.microbatch)
