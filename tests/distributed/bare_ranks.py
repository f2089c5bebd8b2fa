"""Ranks without a launcher: none ends another, so that each has to find out for itself."""

import os
import subprocess
import sys

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
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    ended = []
    for rank in started:
        try:
            text = rank.communicate(timeout=timeout)[1]
        except subprocess.TimeoutExpired:
            rank.kill()
            text = HUNG
        ended.append((rank.wait(), text))
    return ended
