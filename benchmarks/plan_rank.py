"""One rank of the planner's runs on stages that sleep; `plan_cpu.py` starts it. Rank 0 writes what all measured as JSON.

A case is ``{"schedule", "vpp", "microbatches", "layers": [per stage], "head": layers that the loss is worth}``. A layer sleeps
``milliseconds`` times a share for F, I and W. All cases run once in each round, so that what else the machine does meets all
alike. What is written: by case, by round, by rank ``{"begin", "end", "actions": [[action, start, end]]}``, in seconds.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.contestants import CPU, FORM, TIMEOUT, SleepingStage, SleepLog, StageWork
from counterflow.planner.layouts import Layout, build_table
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.recorder import Recorder

# What F, I and W of a layer sleep.
SHARES = (1.0, 1.3, 0.7)
ROUNDS = 5


def prepare_case(case: dict[str, Any], milliseconds: float, channels: Channels) -> Callable[[], dict[str, Any]]:
    """Return a function that runs a step of a case and returns this rank's times."""
    layout = Layout(pp=len(channels.pipeline_ranks), vpp=case["vpp"], schedule=case["schedule"])
    table = build_table(layout, case["microbatches"])
    program = lower(table, channels.rank)
    channels.connect(program, FORM, CPU)
    last, log = table.layout.last_stage, SleepLog()
    sizes = [layers + (case["head"] if stage == last else 0.0) for stage, layers in enumerate(case["layers"])]
    stages = {
        stage: SleepingStage(log, sizes[stage] * milliseconds / 1000, SHARES) for stage in table.layout.stages[channels.rank]
    }
    work, recorder = StageWork(stages, last), Recorder(channels.rank, use_cuda_events=False)

    def run_step() -> dict[str, Any]:
        dist.barrier()
        begin = time.monotonic()
        run_program(program, work, Mailbox(channels, FORM, CPU), recorder=recorder)
        end = time.monotonic()
        actions = [[str(span.action), span.start, span.end] for span in recorder.take_spans()]
        return {"begin": begin, "end": end, "actions": actions}

    return run_step


def main() -> None:
    """Run all cases; rank 0 writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--milliseconds", type=float)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels = Channels(list(range(ranks)), rank, TIMEOUT)
    cases = json.loads(given.cases.read_text())
    steps = [prepare_case(case, given.milliseconds, channels) for case in cases]
    results: list[list[Any]] = [[] for _ in cases]
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", flush=True)
        for step, result in zip(steps, results, strict=True):
            found: list[Any] = [None] * ranks
            dist.all_gather_object(found, step())
            result.append(found)
    if rank == 0:
        (given.out / "measured.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
