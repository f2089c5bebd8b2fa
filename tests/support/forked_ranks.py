"""Ranks on this machine, forked from one process for each trainer that has imported it once (`fork_server.py`)."""

import atexit
import json
import os
import signal
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import ROOT

SECONDS = 300.0
# Of a fault in compiled code.
SIGNALS = {-signal.SIGSEGV, -signal.SIGABRT}


class RanksError(RuntimeError):
    """A rank ended badly; the message says which and what it wrote last."""


def fork_ranks(
    worker: str,
    argument: Any,
    ranks: int,
    logs: Path,
    *,
    alone: bool = False,
    timeout: float = SECONDS,
    capability: str | None = None,
    trainer: str = "megatron",
) -> list[int | None]:
    """Have every rank call ``run(argument)`` of a worker module; return exit statuses, None for a rank that did not end in time.

    Each writes ``<rank>/stdout.log`` and ``stderr.log`` under ``logs``. One that fails ends the others unless they are ``alone``.
    With a ``capability``, Megatron finds Transformer Engine, stood in for as on a GPU of that kind.
    """
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    job = {"worker": worker, "argument": argument, "ranks": ranks, "port": store.port, "logs": str(logs)}
    server = _start_server(os.environ.get("PYTHONPATH", ""), "engine" if capability else trainer, capability)
    assert server.stdin is not None and server.stdout is not None
    try:
        server.stdin.write(json.dumps({**job, "alone": alone, "timeout": timeout}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    except BaseException:
        # Interrupted: the answer to this job must not be read as that to the next.
        _start_server.cache_clear()
        raise
    if not answer:
        raise RuntimeError(f"the process that forks ranks ended with status {server.wait()}")
    statuses: list[int | None] = json.loads(answer)
    return statuses


def run_ranks(
    worker: str, argument: Any, ranks: int, logs: Path, *, capability: str | None = None, trainer: str = "megatron"
) -> list[str]:
    """Have every rank call ``run(argument)`` of a worker module; return what each printed. All have to end well.

    About one training in a thousand dies of a segmentation fault in one of torch's threads for gloo; why is not known yet. It is
    run once more, with a warning that has the stacks. What dies twice fails.
    """
    statuses = fork_ranks(worker, argument, ranks, logs, capability=capability, trainer=trainer)
    if SIGNALS.intersection(statuses):
        died = logs.rename(logs.with_name(f"{logs.name}, died"))
        warnings.warn(f"a rank died and the training is run once more: {_describe(died, statuses)}", stacklevel=2)
        statuses = fork_ranks(worker, argument, ranks, logs, capability=capability, trainer=trainer)
    if statuses != [0] * ranks:
        raise RanksError(_describe(logs, statuses))
    return [(logs / str(rank) / "stdout.log").read_text() for rank in range(ranks)]


def _describe(logs: Path, statuses: list[int | None]) -> str:
    """Say how ranks ended, and what the one wrote last of which the others may have ended."""
    bad = [rank for rank, status in enumerate(statuses) if status != 0]
    # One that died of a signal was first. Those that were ended because of another, None, have less to say.
    first = min(bad, key=lambda rank: 1 if statuses[rank] is None else min(0, statuses[rank] or 0))
    written = (logs / str(first) / "stderr.log").read_text()[-3000:]
    return f"{logs.name}: rank {first} of {statuses} ended badly; it wrote last: {written}"


@cache
def _start_server(first: str, imported: str, capability: str | None) -> "subprocess.Popen[str]":
    """Start the process that forks ranks, one for each ``PYTHONPATH`` (it may name another Megatron) and each kind of ranks."""
    path = os.pathsep.join(filter(None, [str(ROOT), first, *sys.path]))
    server = subprocess.Popen(
        [sys.executable, "-u", "-P", "-W", "ignore", "-m", "tests.support.fork_server", imported],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            **({"COUNTERFLOW_CPU_CAPABILITY": capability} if capability else {}),
            # A machine with GPUs runs the CPU's tests too. Asked in another way, CUDA would be at work before the fork.
            **({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} if imported == "gpus" else {"CUDA_VISIBLE_DEVICES": ""}),
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
        },
    )
    atexit.register(server.communicate)  # it ends when nothing can be asked of it any more
    return server
