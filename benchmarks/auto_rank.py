"""One rank of the benchmark of ``--cf-schedule auto``; `auto.py` starts it. Rank 0 writes what all measured as JSON."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contestants import TIMEOUT, Size, SleepingStage, SleepLog, make_adapter, on_cpu_platform
from counterflow.trainer import auto

# What F, I and W sleep: backwards of a Transformer with attention. For equal ones ZB-V is as good as a table gets here.
SHARES = (1.0, 1.5, 0.5)
MOST_STEPS = 5_000


def note_choices(noted: list[dict[str, Any]]) -> None:
    """Let every choice of a table be noted, with what it was made for."""
    choose = auto.AutoTable.choose

    def choose_and_note(self: auto.AutoTable, microbatches: int, step: int) -> Any:
        is_measuring = self.is_measuring
        table = choose(self, microbatches, step)
        phase = "measures" if is_measuring else "searches" if self.is_searching else "is done"
        noted.append({"phase": phase, "table": table.name, "digest": table.digest})
        return table

    auto.AutoTable.choose = choose_and_note  # type: ignore[method-assign]


def run_steps(step: Callable[[], list[Any]], stages: list[SleepingStage], after: int) -> list[dict[str, Any]]:
    """Run until ``after`` steps after the search; return each step's table, begin and end, losses and gradients."""
    noted: list[dict[str, Any]] = []
    note_choices(noted)
    done = 0
    while done < after:
        if len(noted) == MOST_STEPS:
            raise RuntimeError(f"the search has not ended after {MOST_STEPS} steps")
        for stage in stages:
            stage.weight.grad = None
        dist.barrier()
        begin = time.monotonic()
        losses = step()
        noted[-1] |= {"begin": begin, "end": time.monotonic(), "losses": [float(one["loss"]) for one in losses]}
        noted[-1]["gradients"] = [float(stage.weight.grad.sum()) for stage in stages if stage.weight.grad is not None]
        done += noted[-1]["phase"] == "is done"
        print(f"step {len(noted)}: {noted[-1]['phase']}, {noted[-1]['table']}", flush=True)
    return noted


def main() -> None:
    """Train on sleeping stages; rank 0 writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--milliseconds", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--after", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dist.init_process_group("gloo", timeout=TIMEOUT)
    auto.SEARCH_SECONDS = given.seconds
    rank, size = dist.get_rank(), Size(dist.get_world_size(), given.microbatches, given.milliseconds / 1000)
    stages = [SleepingStage(SleepLog(), size.seconds, SHARES) for _ in range(2)]
    for chunk, stage in enumerate(stages):
        torch.nn.init.constant_(stage.weight, 1.0 + rank + chunk / 2)
    with on_cpu_platform():
        _, step = make_adapter("auto", stages, size, is_v=True)
        mine = run_steps(step, stages, given.after)
    rows: list[Any] = [None] * size.ranks
    dist.all_gather_object(rows, mine)
    if rank == 0:
        (given.out / "measured.json").write_text(json.dumps({"ranks": size.ranks, "steps": list(zip(*rows, strict=True))}))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
