"""One of two expert-parallel ranks that run pairs whose communications are real all-to-alls."""

import os
import random
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from counterflow.errors import CounterflowError
from counterflow.runtime import communicate
from counterflow.runtime.executor import run_program
from counterflow.runtime.handover import HandOver
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Member, Message
from counterflow.runtime.watch import Watch, find_store
from counterflow.schedule import ScheduleTable, lay_straight
from counterflow.schedule.actions import Action, pair

RUNS = 200
FORM = (Member((2,), torch.float32),)


def exchange(number: int, name: str = "") -> None:
    """Send this transfer's number to the other rank, which must be at the same one."""
    sent, received = torch.full((2,), number), torch.zeros(2, dtype=torch.int64)
    communicate(lambda: dist.all_to_all_single(received, sent, async_op=True), lambda work: work.wait(), name)
    assert received.tolist() == [number, number], f"transfer {number} met {received.tolist()}"


def run_with_delays() -> None:
    """Random pairs of unequal stages, the same on both ranks, with pauses that differ."""
    handover, pauses = HandOver(), random.Random(f"pauses of {dist.get_rank()}")
    for run in range(RUNS):
        counts = random.Random(run)

        def run_part(first: int, count: int) -> None:
            for number in range(count):
                if pauses.random() < 0.3:
                    time.sleep(pauses.random() * 0.003)
                exchange(first + number)

        f, b = counts.randrange(7), counts.randrange(7)
        handover.run_pair(Action("F", f, 1), lambda f=f: run_part(100, f), Action("B", b, 0), lambda b=b: run_part(200, b))
    dist.barrier()


class Work:
    """Parts with three communications each; rank 1 is killed in the pair, at the backward's second."""

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        for number in range(3):
            exchange(number, f"dispatch {number}")
        return (torch.ones(2),)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        for number in range(3):
            if (microbatch, number) == (0, 1) and dist.get_rank() == 1:
                time.sleep(1.2)  # long enough to have been heard of
                os.kill(os.getpid(), signal.SIGKILL)
            exchange(10 + number, f"combine {number}")
        return ()

    def finish_backward(self, stage: int, microbatch: int) -> None:
        pass

    def release_output(self, stage: int, microbatch: int) -> None:
        pass


def run_and_die() -> None:
    rank, limit = dist.get_rank(), timedelta(seconds=20)
    row = (Action("F", 0, 0), pair(Action("F", 0, 1), Action("B", 0, 0)), Action("B", 0, 1))
    program = lower(ScheduleTable("pair", lay_straight(1), 2, (row,)), 0)
    watch = Watch(find_store(), [rank], 0, limit.total_seconds())
    mailbox = Mailbox(Channels([rank], 0, limit), FORM, torch.device("cpu"))
    try:
        run_program(program, Work(), mailbox, watch=watch, handover=HandOver())
    except CounterflowError as error:
        print(f"said: {error}", file=sys.stderr, flush=True)
        raise


def run(case: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    run_with_delays() if case == "delays" else run_and_die()
