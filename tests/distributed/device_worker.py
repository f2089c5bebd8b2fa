"""One rank of a training on the emulated device; `benchmarks/device_contestants.py` starts it too.

A case is that of `worker.py` with "counts", a file of ``int64[micro-batches, layers, experts]``; "tokens" of
a micro-batch; "speeds", those of `Speeds`; "warmup", the steps in which nothing sleeps, so that plans have a past.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np
import torch.distributed as dist

import worker
from benchmarks.device import Device, Routes, Speeds, emulate
from counterflow.patching import Patches


@contextmanager
def run_on_device(case: dict[str, Any], times: list[tuple[float, ...]], device: Device) -> Iterator[Device]:
    """Train on the device inside the block; ``times`` get each step's begin and end, by the wall's clock, then the device's, then
    its seconds by one of `CAUSES`.
    """
    from megatron.training import training

    nodes = case["speeds"]["node_of_rank"]
    rank = int(os.environ["RANK"])
    routes = Routes(np.load(case["counts"]), case["tokens"], rank, len(nodes))
    patches = Patches()

    def time_step(train: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(train)
        def train_timed(*args: Any, **kwargs: Any) -> Any:
            device.is_on = len(times) >= case["warmup"]
            device.meet()
            begin = time.monotonic(), device.clock, device.account
            result = train(*args, **kwargs)
            device.meet()
            spent = device.account - begin[2]
            times.append((begin[0], time.monotonic(), begin[1], device.clock, *spent.tolist()))
            return result

        return train_timed

    with emulate(device, routes):
        patches.set(training, "train_step", time_step(training.train_step))
        if len(set(nodes)) > 1:
            patches.set(socket, "gethostname", lambda: f"node{nodes[rank]}")
        try:
            yield device
        finally:
            patches.undo()


def run(job: dict[str, Any]) -> None:
    """Run the job's case; what all ranks noted is in the result."""
    case, times = job["case"], []
    device = Device(Speeds(**{**case["speeds"], "node_of_rank": tuple(case["speeds"]["node_of_rank"])}))
    result = worker.run_case(case, partial(run_on_device, case, times, device))
    seen = [[note.entered, note.left, note.entered_back, note.left_back, note.tokens] for note in device.notes]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"times": times, "notes": seen})
    worker.write_result(job, {**result, "inside": None, "ranks": gathered})
