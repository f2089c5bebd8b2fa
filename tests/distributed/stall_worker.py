"""One rank of the stall tests. Rank 2 misbehaves at a place of the table; the others are to say so."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from counterflow.errors import CounterflowError
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Member, Message
from counterflow.runtime.watch import Watch, find_store
from counterflow.schedule import build
from stall_cases import CASES, LIMIT, MICROBATCHES, RANKS

SHAPE = (2, 2)
FORM = (Member(SHAPE, torch.float32), Member((2,), torch.bool))


class Work:
    """Stages that take a few milliseconds; on rank 2 the given action goes wrong."""

    def __init__(self, rank: int, how: str, at: str) -> None:
        self.how, self.at = (how, at) if rank == 2 else ("", "")

    def compute(self, action: str) -> torch.Tensor:
        time.sleep(0.002)
        if action != self.at:
            return torch.ones(SHAPE)
        match self.how:
            case "killed":
                time.sleep(1.2)  # long enough to have been heard of
                os.kill(os.getpid(), signal.SIGKILL)
            case "late":
                time.sleep(3 * LIMIT)
            case "nan":
                raise RuntimeError("found NaN in local forward loss")
            case "shape":
                return torch.ones(3, 2)
            case "dtype":
                return torch.ones(SHAPE, dtype=torch.float64)
        return torch.ones(SHAPE)

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        return self.compute(f"{stage}F{microbatch}"), torch.ones(2, dtype=torch.bool)

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        return self.compute(f"{stage}B{microbatch}"), None

    def finish_backward(self, stage: int, microbatch: int) -> None:
        pass

    def release_output(self, stage: int, microbatch: int) -> None:
        pass


def run(case: str) -> None:
    how, at = CASES[case]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, timeout = dist.get_rank(), timedelta(seconds=LIMIT)
    channels = Channels(list(range(RANKS)), rank, timeout)
    watch = Watch(find_store(), channels.pipeline_ranks, rank, LIMIT)
    micros = MICROBATCHES + 1 if how == "table" and rank == 2 else MICROBATCHES
    program, cpu = lower(build("dualpipev", RANKS, micros), rank), torch.device("cpu")
    try:
        channels.connect(program, FORM, cpu)
        run_program(program, Work(rank, how, at), Mailbox(channels, FORM, cpu), watch=watch)
    except CounterflowError as error:
        print(f"said: {error}", file=sys.stderr, flush=True)
        raise
