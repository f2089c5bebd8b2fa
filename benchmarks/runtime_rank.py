"""One rank of the runtime's benchmark; `runtime.py` starts it. Rank 0 writes what all measured as JSON."""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contestants import (
    CPU,
    FORM,
    SHAPE,
    TIMEOUT,
    BareWork,
    Contestant,
    Size,
    SleepLog,
    enter_platform,
    list_contestants,
)
from benchmarks.deepspeed_contestants import list_deepspeed_contestants
from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Message
from counterflow.schedule import Costs, ScheduleTable, build, simulate

EMPTY_RUNS = 20


def run_step(contestant: Contestant, number: int, log: SleepLog) -> dict[str, float]:
    """Run one step of all ranks; return its makespan and bubble, from the first sleep's begin to the last one's end."""
    with enter_platform(contestant):
        log.entries.clear()
        dist.barrier()
        contestant.step()
    dist.barrier()
    contestant.finish_step(number)
    busy = sum(end - begin for _, begin, end in log.entries)
    mine = torch.tensor([-log.entries[0][1], log.entries[-1][2], busy], dtype=torch.float64)
    extremes, total = mine[:2].clone(), mine[2:].clone()
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    makespan = float(extremes.sum())
    return {"makespan": makespan, "bubble": 1 - float(total) / (makespan * dist.get_world_size())}


def check_sleeps(contestant: Contestant, size: Size, log: SleepLog) -> None:
    """Raise unless this rank slept one F, one I and one W for each of its (stage, micro-batch)s, as long as it should."""
    chunks = contestant.chunks
    slept = Counter(kind for kind, _, _ in log.entries)
    if any(slept[kind] != chunks * size.microbatches for kind in "FIW"):
        raise RuntimeError(f"{contestant.name} slept {dict(slept)}; each is to be {chunks * size.microbatches}")
    shortest = min(end - begin for _, begin, end in log.entries)
    if shortest < size.find_sleep(chunks):
        raise RuntimeError(f"{contestant.name} slept {shortest} s; at least {size.find_sleep(chunks)} s are to be slept")


def compare(size: Size, rounds: int, channels: Channels, records: Path) -> list[dict[str, Any]]:
    """Let everyone run one step to connect and be checked, then ``rounds`` times one step each, turn by turn."""
    log = SleepLog()
    contestants = list_contestants(size, log, channels, records) + list_deepspeed_contestants(size, log)
    for contestant in contestants:
        print(f"{1000 * size.seconds:g} ms, first step of {contestant.name}", flush=True)
        run_step(contestant, 0, log)
        check_sleeps(contestant, size, log)
    steps: list[list[dict[str, float]]] = [[] for _ in contestants]
    for number in range(1, rounds + 1):
        print(f"{1000 * size.seconds:g} ms, round {number} of {rounds}", flush=True)
        for contestant, taken in zip(contestants, steps, strict=True):
            taken.append(run_step(contestant, number, log))
            check_sleeps(contestant, size, log)
    return [_describe(contestant, size, taken) for contestant, taken in zip(contestants, steps, strict=True)]


def take_apart(table: ScheduleTable) -> ScheduleTable:
    """Return the table with the parts of its pairs one after the other.

    That is what runs here: F, its result on its way, then B. Simulated as one block a pair would have its result later and need
    its B's input earlier, and a runtime could beat what it is to be measured by.
    """
    return replace(table, actions=tuple(tuple(table.singles(rank)) for rank in range(table.ranks)))


def _describe(contestant: Contestant, size: Size, steps: list[dict[str, float]]) -> dict[str, Any]:
    seconds = size.find_sleep(contestant.chunks)
    simulated = simulate(take_apart(contestant.table), Costs(seconds, seconds, seconds))
    fastest = min(step["makespan"] for step in steps)
    if fastest < simulated.makespan:
        raise RuntimeError(f"{contestant.name} took {fastest} s, less than the {simulated.makespan} s that are possible")
    return {
        "name": contestant.name,
        "seconds": size.seconds,
        "simulated_makespan": simulated.makespan,
        "simulated_bubble": simulated.bubble,
        "makespans": [step["makespan"] for step in steps],
        "bubbles": [step["bubble"] for step in steps],
    }


class EmptyWork(BareWork):
    """Stages that do nothing: what is left is the executor."""

    def __init__(self) -> None:
        self._message = (torch.zeros(SHAPE),)

    def forward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the same message each time."""
        return self._message

    def backward(self, stage: int, microbatch: int, received: Message) -> Message:
        """Return the same message each time."""
        return self._message


def measure_executor(schedule: str, size: Size, channels: Channels) -> dict[str, Any]:
    """Return seconds per F, I, W or B with empty stages, P2P calls included: this rank's thread, its process, and by the clock.

    The thread is the executor's own time; the process has gloo's threads too; the clock has waiting for other ranks.
    """
    table = build(schedule, size.ranks, size.microbatches)
    program, work = lower(table, channels.rank), EmptyWork()
    channels.connect(program, FORM, CPU)
    count = len(list(table.singles(channels.rank)))
    clocks = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
    taken: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(EMPTY_RUNS):
        dist.barrier()
        begun = {name: clock() for name, clock in clocks.items()}
        run_program(program, work, Mailbox(channels, FORM, CPU))
        for name, clock in clocks.items():
            taken[name].append((clock() - begun[name]) / count)
    return {
        "schedule": schedule,
        "rank": channels.rank,
        "actions": count,
        **{f"{name}_median": statistics.median(values) for name, values in taken.items()},
        **{f"{name}_best": min(values) for name, values in taken.items()},
    }


def main() -> None:
    """Run all sizes; rank 0 writes the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--milliseconds", type=float, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels = Channels(list(range(ranks)), rank, TIMEOUT)
    results = []
    for milliseconds in given.milliseconds:
        size = Size(ranks, given.microbatches, milliseconds / 1000)
        results += compare(size, given.rounds, channels, given.out / f"record-{milliseconds:g}ms")
    empty: list[Any] = [None] * ranks
    mine = [measure_executor(schedule, Size(ranks, given.microbatches, 0.0), channels) for schedule in ("dualpipev", "zbv")]
    dist.all_gather_object(empty, mine)
    if rank == 0:
        overhead = [found for each in empty for found in each]
        text = json.dumps({"ranks": ranks, "microbatches": given.microbatches, "results": results, "executor": overhead})
        (given.out / "measured.json").write_text(text)
    dist.barrier()
    os._exit(0)  # three runtimes have threads that wait for each other at an ordinary end


if __name__ == "__main__":
    main()
