"""Ranks without a launcher: none ends another, so that each has to find out for itself."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from typing import IO

import torch.distributed as dist

HUNG = "HUNG"


def run_bare(command: list[str], ranks: int, timeout: float) -> list[tuple[int, str]]:
    """Run a Python command line on every rank; return each one's exit status and what it wrote to stderr.

    A rank that has not ended after ``timeout`` seconds, from the one before it on, is killed and has written `HUNG`.
    """
    # As under torchrun, the store is not in a rank: it outlives them.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as files:
        # Not pipes: a process that a killed rank has left behind would hold them open.
        errors = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        started = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=error,
                start_new_session=True,
            )
            for rank, error in enumerate(errors)
        ]
        return [_wait(rank, error, timeout) for rank, error in zip(started, errors, strict=True)]


def _wait(rank: subprocess.Popen[bytes], error: IO[str], timeout: float) -> tuple[int, str]:
    try:
        status = rank.wait(timeout)
        error.seek(0)
        return status, error.read()
    except subprocess.TimeoutExpired:
        rank.kill()
        return rank.wait(), HUNG
    finally:
        # The manager of Megatron's checkpoint writer outlives a killed rank.
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
