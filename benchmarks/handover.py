"""What a hand-over between the two parts of an overlapped pair costs: `python -m benchmarks.handover [--turns 2000]`.

Two flows do nothing but communicate, so that each communication is a hand-over. Bare: two threads that pass a baton, and
greenlets, if they are installed; then the runtime's own, alone, with Megatron's global state, and inside of a backward. Medians
of some rounds, in turn, in microseconds per hand-over.
"""

import argparse
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from counterflow.runtime import communicate
from counterflow.runtime.handover import HandOver
from counterflow.schedule.actions import Action


def time_threads(turns: int) -> float:
    """Return the seconds of one change between two threads that pass a lock to and fro."""
    mine, other = threading.Lock(), threading.Lock()
    mine.acquire(), other.acquire()

    def answer() -> None:
        for _ in range(turns):
            other.acquire()
            mine.release()

    thread = threading.Thread(target=answer)
    thread.start()
    begun = time.perf_counter()
    for _ in range(turns):
        other.release()
        mine.acquire()
    seconds = time.perf_counter() - begun
    thread.join()
    return seconds / (2 * turns)


def time_greenlets(turns: int) -> float:
    """Return the seconds of one change between two greenlets."""
    from greenlet import getcurrent, greenlet

    here = getcurrent()

    def answer() -> None:
        while True:
            here.switch()

    other = greenlet(answer)
    begun = time.perf_counter()
    for _ in range(turns):
        other.switch()
    return (time.perf_counter() - begun) / (2 * turns)


class Communication(torch.autograd.Function):
    """A communication without a transfer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Hand over."""
        return communicate(lambda: None, lambda _: grads[0])


def time_pair(handover: HandOver, run_backward: Callable[[], None], turns: int) -> float:
    """Return the seconds of one hand-over in a pair whose parts communicate ``turns`` times."""

    def run_forward() -> None:
        for _ in range(turns):
            communicate(lambda: None, lambda _: None)

    begun = time.perf_counter()
    handover.run_pair(Action("F", 0, 1), run_forward, Action("B", 0, 0), run_backward)
    return (time.perf_counter() - begun) / (2 * turns)


def time_runtime(handover: HandOver, turns: int) -> float:
    """Return the seconds of a hand-over between two plain functions."""

    def run_backward() -> None:
        for _ in range(turns):
            communicate(lambda: None, lambda _: None)

    return time_pair(handover, run_backward, turns)


def time_in_backward(handover: HandOver, turns: int) -> float:
    """Return the seconds of a hand-over between a forward and torch's backward, its nodes included."""
    x = torch.ones(1, requires_grad=True)
    y = x
    for _ in range(turns):
        y = Communication.apply(y)
    return time_pair(handover, y.backward, turns)


def make_megatron_handover() -> HandOver:
    """Return a hand-over that carries Megatron's global state, on the CPU platform."""
    from counterflow.platform import install_cpu

    install_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    from counterflow.megatron.pipeline.overlap import list_carried

    parallel_state.set_pipeline_model_parallel_rank(0)
    tracker = random.get_cuda_rng_tracker()
    for name in ("model-parallel-rng", "expert-parallel-rng", "data-parallel-rng"):
        tracker.add(name, len(tracker.get_states()) + 1)
    return HandOver(list_carried())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2000, help="communications of each part (default: 2000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per median (default: 7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = HandOver()
    cases: dict[str, Callable[[], float]] = {"two threads and a baton": lambda: time_threads(args.turns)}
    if importlib.util.find_spec("greenlet"):
        cases["greenlets"] = lambda: time_greenlets(args.turns)
    cases["counterflow.runtime"] = lambda: time_runtime(plain, args.turns)
    cases["the same, in torch's backward"] = lambda: time_in_backward(plain, args.turns)
    megatron = make_megatron_handover() if importlib.util.find_spec("megatron.core") else None
    if megatron is not None:
        cases["with Megatron's state"] = lambda: time_in_backward(megatron, args.turns)
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, measure in cases.items():
            found[name].append(measure())
    for name, seconds in found.items():
        print(f"  {name:<32} {1e6 * statistics.median(seconds):6.1f} us a hand-over")


if __name__ == "__main__":
    main()
