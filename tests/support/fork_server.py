"""Starts ranks as forks of one process that has imported a trainer, the one named: it takes a tenth of a second for each case.

Reads jobs as JSON lines from stdin and answers each by a line: the exit statuses of its ranks, None for one that did not end in
time. A job is {"worker", "argument", "ranks", "port", "logs", "alone", "timeout"}: every rank calls the worker module's
`run(argument)`; ``port`` is that of the store at which they meet; unless they are ``alone``, a rank that fails ends the others.
"""

import argparse
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# How long the others may go on, to say what they found, when a rank has failed.
GRACE_SECONDS = 1.0
POLL_SECONDS = 0.01


def main() -> None:
    # Whoever asks ends this process by going away; a signal to all would leave the ranks behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    imports = {
        "megatron": import_megatron,
        "engine": partial(import_megatron, engine=True),
        "gpus": partial(import_megatron, on_gpus=True),
        "deepspeed": import_deepspeed,
    }
    imports[sys.argv[1]]()
    for line in sys.stdin:
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


def import_megatron(*, engine: bool = False, on_gpus: bool = False) -> None:
    """Do once what every rank would do alike, without starting a thread: forks have only the one that forks.

    With ``engine``, Megatron finds Transformer Engine over the CPU platform's stand-in. ``on_gpus``, it finds what is installed.
    """
    import counterflow
    from counterflow.patching import Patches
    from counterflow.platform import install_cpu

    patches = Patches() if on_gpus else install_cpu(engine=engine)
    for name in ("megatron.training", "torch.distributed.checkpoint", "tensorboard", "torch._dynamo.trace_rules"):
        importlib.import_module(name)
    with suppress(ImportError):  # the example's script is for Megatron 0.19 and later
        importlib.import_module("pretrain_moe")
    for module in pkgutil.walk_packages(counterflow.__path__, "counterflow."):
        if module.name.split(".")[1] in ("balance", "fp8", "megatron", "moe", "runtime", "trainer"):
            importlib.import_module(module.name)
    read_arguments_once()
    patches.undo()
    # A rank's garbage collections leave out what was imported here: they would copy its memory and take a second per checkpoint.
    gc.collect()
    gc.freeze()


def import_deepspeed() -> None:
    """As `import_megatron`, for DeepSpeed on the CPU."""
    import counterflow

    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    import deepspeed

    # Otherwise it compiles an extension when ranks meet.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("pipe.engine", "pipe.dualpipev", "zero.stage_1_and_2", "zero.muon.muon_optimizer", "bf16_optimizer"):
        importlib.import_module(f"deepspeed.runtime.{name}")
    for module in pkgutil.walk_packages(counterflow.__path__, "counterflow."):
        if module.name.split(".")[1] in ("balance", "deepspeed", "moe", "runtime", "trainer"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()


def read_arguments_once() -> None:
    """Keep what Megatron reads of its own source for its arguments' help: a third of what a rank computes before it trains."""
    from megatron.training import argument_utils, arguments

    # Megatron 0.17 has written its help out.
    if (factory := getattr(argument_utils, "ArgumentGroupFactory", None)) is not None:
        read = cache(partial(factory._get_field_docstrings, SimpleNamespace(_get_field_docstrings=lambda owner: read(owner))))
        factory._get_field_docstrings = lambda self, owner: read(owner)
        arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def run_job(job: dict[str, Any]) -> list[int | None]:
    """Fork the ranks, wait for them, end what they leave behind; return their exit statuses."""
    running: dict[int, int] = {}
    for rank in range(job["ranks"]):
        child = os.fork()
        if not child:
            be_rank(job, rank)
        running[child] = rank
    statuses: list[int | None] = [None] * job["ranks"]
    parent, end = os.getppid(), time.monotonic() + job["timeout"]
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = running.pop(child)
            statuses[rank] = os.waitstatus_to_exitcode(status)
            kill_group(child)
            if statuses[rank] and not job["alone"]:
                end = min(end, time.monotonic() + GRACE_SECONDS)
        elif time.monotonic() > end or os.getppid() != parent:
            break
        else:
            time.sleep(POLL_SECONDS)
    for child in running:
        kill_group(child)
        os.waitpid(child, 0)
    return statuses


def kill_group(child: int) -> None:
    """End a rank and what it started: the manager of Megatron's checkpoint writer outlives a killed rank."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def be_rank(job: dict[str, Any], rank: int) -> None:
    """Run as a rank, in a process group of its own, and end the process."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        folder = Path(job["logs"]) / str(rank)
        folder.mkdir(parents=True)
        for descriptor, path in enumerate((Path(os.devnull), folder / "stdout.log", folder / "stderr.log")):
            os.dup2(os.open(path, os.O_RDONLY if not descriptor else os.O_WRONLY | os.O_CREAT), descriptor)
        # Where a rank was that dies by a signal, such as a segmentation fault.
        faulthandler.enable()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "localhost", "MASTER_PORT": str(job["port"])}
        if sys.argv[1] == "gpus":
            from tests.support.gpus import count_gpus, place_rank

            os.environ |= place_rank(rank, job["ranks"], count_gpus())
        # As under torchrun, the store is in no rank: it outlives them.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        importlib.import_module(job["worker"]).run(job["argument"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
