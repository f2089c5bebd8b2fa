"""One rank of the planner's runs on stages that sleep; `plan_cpu.py` starts it. Rank 0 writes what all measured as JSON.

A case is ``{"schedule", "vpp", "microbatches", "layers": [per stage], "head": layers that the loss is worth}``. A layer sleeps
``milliseconds`` times a share for F, I and W.
"""

import argparse
import json
import os
import statistics
import time
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
STEPS = 4


def run_case(case: dict[str, Any], milliseconds: float, channels: Channels) -> dict[str, Any]:
    """Return each step's begin and end on this rank, and the median seconds of each (stage, kind)."""
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
    steps: list[tuple[float, float]] = []
    taken: dict[str, list[float]] = {}
    for _ in range(STEPS):
        dist.barrier()
        begin = time.monotonic()
        run_program(program, work, Mailbox(channels, FORM, CPU), recorder=recorder)
        steps.append((begin, time.monotonic()))
        for span in recorder.take_spans():
            for single in span.action.singles():
                taken.setdefault(f"{single.stage}{single.kind}", []).append(span.end - span.start)
    return {"steps": steps, "medians": {key: statistics.median(times) for key, times in taken.items()}}


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
    results = []
    for case in json.loads(given.cases.read_text()):
        print(f"{case['name']}", flush=True)
        mine = run_case(case, given.milliseconds, channels)
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, mine)
        results.append(found)
    if rank == 0:
        (given.out / "measured.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
