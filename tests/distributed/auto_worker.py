"""One rank of the tests of ``--cf-schedule auto`` without a model: which table is in use at which step.

Every rank writes, for each scenario, the micro-batches and the table of each step.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterflow.schedule import Costs, search_process, simulate, validate
from counterflow.trainer import auto

CPU = torch.device("cpu")
# By these a table takes less time than ZB-V, with 6 micro-batches as with 8.
UNEVEN, EVEN = Costs(1.0, 1.5, 0.5), Costs(1.0, 1.0, 1.0)
MOST_STEPS = 20_000
# Without a search, after the last: the tables that were found are in use.
LAST_STEPS = 15


def run_steps(
    costs: Costs, count: Callable[[int], int], steps: int = MOST_STEPS, meddle: Any = None, *, is_given: bool = False
) -> list[tuple[int, str]]:
    """Choose tables for steps of uneven pace, until all is searched or ``steps`` are over; return what was chosen."""
    rank, pace, idle = dist.get_rank(), random.Random(dist.get_rank()), 0
    chosen: list[tuple[int, str]] = []
    given = costs if is_given else None
    table = auto.AutoTable(dist.group.WORLD, CPU, has_pairs=False, splits=True, costs=given)
    assert table.is_measuring != is_given
    while len(chosen) < steps and idle < LAST_STEPS:
        is_measuring, number = table.is_measuring, len(chosen) + 1
        used = table.choose(count(number), number)
        validate(used)
        chosen.append((used.microbatches, used.name))
        if is_measuring:
            spans = simulate(used, costs.spread(2 * used.ranks)).spans
            table.note([span for span in spans if span.rank == rank])
        elif meddle is not None and rank == 0 and table._process is not None:
            meddle(table._process._process.pid)
        idle = 0 if table.is_measuring or table.is_searching else idle + 1
        time.sleep(pace.uniform(0.0, 0.04))
    if table.is_searching and rank == 0:
        running = table._process._process
        assert running.poll() is None
        del table
        assert running.poll() is not None, "the search goes on"
    return chosen


def grow(number: int) -> int:
    """Return 6 micro-batches, then 8 and 6 in turn."""
    return 8 if number > 5 and number // 5 % 2 else 6


def list_scenarios() -> dict[str, Callable[[], list[tuple[int, str]]]]:
    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def search_nowhere() -> list[tuple[int, str]]:
        executable, sys.executable = sys.executable, "/nowhere/python"
        try:
            return run_steps(UNEVEN, lambda number: 6)
        finally:
            sys.executable = executable

    def search_long() -> list[tuple[int, str]]:
        auto.SEARCH_SECONDS = 300.0
        return run_steps(UNEVEN, lambda number: 6, steps=6)

    return {
        "grows": lambda: run_steps(UNEVEN, grow),
        "nothing better": lambda: run_steps(EVEN, lambda number: 6),
        "killed": lambda: run_steps(UNEVEN, lambda number: 6, meddle=kill),
        "no process": search_nowhere,
        "costs given": lambda: run_steps(UNEVEN, lambda number: 6, is_given=True),
        "ends while searching": search_long,
    }


def run(results: str) -> None:
    dist.init_process_group("gloo")
    auto.SEARCH_SECONDS = 0.5
    search_process.LOWEST_PRIORITY = 0  # beside other tests the lowest may not run at all
    chosen = {name: choose() for name, choose in list_scenarios().items()}
    (Path(results) / f"chosen-{dist.get_rank()}.json").write_text(json.dumps(chosen))
    dist.barrier()
    dist.destroy_process_group()
