"""The figures of the schedules: `python -m benchmarks.schedules [--seconds 60]`.

Bubbles and makespans of the families, what the search finds under a cap, and how long a simulation takes.
"""

import argparse
import statistics
import time
from typing import Any

from counterflow.schedule import Costs, build, simulate
from counterflow.schedule.search import search

RANKS, MICROBATCHES, OVERLAP, CAP = 8, 32, 0.8, 9.0


def print_families() -> None:
    """Bubble at overlap 1; makespan and peak activations at the overlap; a rank's F = I = W = 1."""
    print(f"P={RANKS}, M={MICROBATCHES}, equal F = I = W = 1 per rank")
    families: list[tuple[str, dict[str, Any], int]] = [("1f1b", {}, 1), ("zb-h1", {}, 1), ("zbv", {}, 2)]
    families += [("dualpipev", {}, 2), *(("interleaved", {"vpp": vpp, "ep_overlap": True}, vpp) for vpp in (2, 4, 8))]
    for name, options, chunks in families:
        table, each = build(name, RANKS, MICROBATCHES, **options), 1 / chunks
        alone = simulate(table, Costs(each, each, each))
        paired = simulate(table, Costs(each, each, each, overlap=OVERLAP))
        sizes = f"vpp {chunks}" if options else ""
        print(
            f"  {name:<11} {sizes:<6} bubble {100 * alone.bubble:5.2f} %   overlap {OVERLAP}: makespan {paired.makespan:6.2f}"
            f"  peak activations {max(paired.peak_activations):g}"
        )


def print_search(seconds: float, seeds: int) -> None:
    """Makespans found under the cap, for two and four chunks a rank and several seeds."""
    for chunks in (2, 4):
        each = 1 / chunks
        costs = Costs(each, each, each, overlap=OVERLAP)
        found = [
            search(RANKS, MICROBATCHES, costs, max_chunks=chunks, max_activations=CAP, seconds=seconds, seed=seed)
            for seed in range(seeds)
        ]
        for seed, one in enumerate(found):
            print(
                f"  search, {chunks} chunks, cap {CAP:g}, seed {seed}, {seconds:g} s: makespan {one.timeline.makespan:.2f}"
                f"  ({one.table.layout.name}), peak activations {max(one.timeline.peak_activations):g},"
                f" queued {max(one.timeline.peak_queued):g}, lower bound {one.lower_bound:.2f}",
                flush=True,
            )


def print_speed() -> None:
    """Median times of building and simulating DualPipeV."""
    for ranks, microbatches, repeats in ((16, 256, 5), (64, 1024, 3)):
        times = []
        for _ in range(repeats):
            table = build("dualpipev", ranks, microbatches)
            begun = time.perf_counter()
            simulate(table, Costs(overlap=OVERLAP, p2p=0.1))
            times.append(time.perf_counter() - begun)
        print(f"  simulation of dualpipev, P={ranks}, M={microbatches}: {statistics.median(times):.2f} s")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description="Print the figures of the schedules.")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of each search (default: 60)")
    parser.add_argument("--seeds", type=int, default=3, help="searches of each kind (default: 3)")
    options = parser.parse_args()
    print_families()
    print_speed()
    print_search(options.seconds, options.seeds)


if __name__ == "__main__":
    main()
