"""One rank of a profiled run on stages that sleep, through the adapter: ``--cf-profile`` on the last steps."""

import argparse
import os
from pathlib import Path

import torch.distributed as dist

from benchmarks.contestants import TIMEOUT, Size, SleepingStage, SleepLog, make_adapter, on_cpu_platform

# What F, I and W sleep.
SHARES = (1.0, 1.5, 0.5)


def main() -> None:
    """Train some steps; those from ``--first`` on, by default the last one, are profiled into the folder that is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--schedule")
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--milliseconds", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--first", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dist.init_process_group("gloo", timeout=TIMEOUT)
    size = Size(dist.get_world_size(), given.microbatches, given.milliseconds / 1000)
    stages = [SleepingStage(SleepLog(), size.seconds, SHARES) for _ in range(2)]
    with on_cpu_platform():
        options = {"profile": f"{given.first or given.steps}:{given.steps}", "record": given.out}
        _, step = make_adapter(given.schedule, stages, size, is_v=True, **options)
        for _ in range(given.steps):
            dist.barrier()
            step()
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
