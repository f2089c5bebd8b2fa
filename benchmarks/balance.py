"""Measures the balancer: recorded and made-up routing replayed, placement at DeepSeek-V3's size, speed beside EPLB, growth.

EPLB's own Python is not part of this repository: clone https://github.com/deepseek-ai/EPLB and give ``--eplb EPLB/eplb.py``.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance import (
    WORKLOADS,
    Placement,
    make_cluster,
    make_home_placement,
    make_workload,
    measure_balancedness,
    plan_clones,
    plan_homes,
    plan_moves,
    plan_placement,
    rebalance_experts,
    replay_trace,
    share_evenly,
    share_tokens,
    split_tokens,
    sum_by_rank,
)
from counterflow.balance.costs import HOME, Costs
from counterflow.balance.exact import FREE, add_shared_slots, plan_exact
from counterflow.balance.files.loads import read_trace
from counterflow.balance.reference import solve_split, solve_traffic

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing_a.npz"
LAYERS, EXPERTS, SLOTS, RANKS, NODES, GROUPS = 58, 256, 320, 64, 8, 8
SIGMAS = (0.5, 1.0, 1.5)
# Widths, ranks and clones per rank of made-up traces; how fast logits wander, and the step of a bias against imbalance.
WIDTHS = ((32, 4, 1), (64, 8, 1), (64, 8, 2), (128, 8, 1), (128, 16, 1), (256, 32, 1))
DRIFTS = ((0.02, 0.0), (0.1, 0.0), (0.05, 0.02))
SIZES = (64, 128, 256, 512, 1024)


def main() -> None:
    """Measure what is asked for, all by default, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--trace", type=Path, default=RECORDED, metavar="FILE", help="the recorded routing to replay")
    parser.add_argument("--eplb", type=Path, metavar="FILE", help="EPLB's eplb.py, to be timed beside")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="random loads per case (default: 3)")
    given = parser.parse_args()
    for part in given.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; allowed: {', '.join(PARTS)}")
    # One core for everyone.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for part in given.parts or PARTS:
        print(f"== {part}", flush=True)
        PARTS[part](given)


def measure_recorded(given: argparse.Namespace) -> None:
    """Replay a recording at several intervals."""
    if not given.trace.exists():
        print(f"{given.trace} is not there; give --trace FILE")
        return
    counts = read_trace(given.trace)
    for ranks in (4, 8, 16):
        for interval in (1, 5, 20):
            print_replay(f"{given.trace.name}, {ranks} ranks, 1 clone per rank, every {interval}", counts, ranks, 1, interval)


def measure_drifting(given: argparse.Namespace) -> None:
    """Replay made-up routing of several widths, with and without a bias that works against imbalance."""
    for experts, ranks, clones in WIDTHS:
        for drift, bias in DRIFTS:
            name = f"{experts} experts, {ranks} ranks, {clones} clones per rank, drift {drift}, bias step {bias}"
            print_replay(name, make_trace(experts, drift, bias), ranks, clones, 1)


def make_trace(experts: int, drift: float, bias_step: float, batches: int = 200, layers: int = 2) -> Array:
    """Return counts of routing whose logits wander, none above one token's single place of six, and vary from batch to batch."""
    random = np.random.default_rng(experts)
    logits = random.normal(0, 1, (layers, experts))
    bias = np.zeros((layers, experts))
    counts = np.empty((batches, layers, experts), np.int64)
    for seen in counts:
        logits = logits * np.sqrt(1 - drift**2) + random.normal(0, drift, logits.shape)
        shares = np.exp(logits + bias + random.normal(0, 0.1, logits.shape))
        shares = np.minimum(shares / shares.sum(1, keepdims=True), 1 / 6)
        seen[:] = [random.multinomial(128 * experts, row / row.sum()) for row in shares]
        bias -= bias_step * np.sign(seen - seen.mean(1, keepdims=True))
    return counts


def print_replay(name: str, counts: Array, ranks: int, clones: int, interval: int) -> None:
    """Print mean and 5th percentile of each method."""
    done = replay_trace(counts, ranks, clones, interval)
    scores = [f"{method} {rows.mean():.4f} {np.percentile(rows, 5):.4f}" for method, rows in done.balancedness.items()]
    print(
        f"{name}: mean and 5th percentile: {', '.join(scores)}; {done.moves.mean():.2f} clones sent a layer and micro-batch",
        flush=True,
    )


def measure_placement(given: argparse.Namespace) -> None:
    """Place DeepSeek-V3's experts freely, under each policy, beside EPLB's plans; traffic beside a linear program's."""
    cluster = make_cluster(RANKS, SLOTS, NODES)
    width = np.full(NODES, RANKS // NODES)
    home = np.arange(EXPERTS) // (EXPERTS // GROUPS)
    for sigma in SIGMAS:
        for seed in range(given.seeds):
            loads = np.random.default_rng(seed).lognormal(0, sigma, (LAYERS, EXPERTS))
            theirs = {groups: score_maps(loads, groups, "deepseek") for groups in (1, GROUPS)}
            ours = score_maps(loads, 1, "auto")
            grouped = score_maps(loads, GROUPS, "auto")
            spilled = plan_placement(loads, cluster, GROUPS, "spill")
            bound = (loads.sum(1) / RANKS / plan_placement(loads, cluster, 1, "global").bound).mean()
            slowest = spilled.rank_loads.max(1)
            least = sum(solve_traffic(row, home, width, pace) for row, pace in zip(loads, slowest, strict=True))
            at_95 = sum(solve_traffic(row, home, width, row.sum() / RANKS / 0.95) for row in loads)
            print(
                f"sigma {sigma} seed {seed}: global {ours.mean():.4f} (EPLB {theirs[1].mean():.4f}, bound {bound:.4f}); "
                f"by node {grouped.mean():.4f} (EPLB {theirs[GROUPS].mean():.4f}); "
                f"layers below EPLB {int((ours < theirs[1] - 1e-9).sum() + (grouped < theirs[GROUPS] - 1e-9).sum())}; "
                f"spill {spilled.balancedness.mean():.4f}, off-node {spilled.off_node.sum() / loads.sum():.2%}, "
                f"{spilled.off_node.sum() / least:.3f} of the least for its pace, "
                f"{spilled.off_node.sum() / at_95:.3f} of the least for 0.95",
                flush=True,
            )


def score_maps(loads: Array, groups: int, policy: str) -> Array:
    """Return the balancedness of each layer under `rebalance_experts`."""
    replicas, _, _ = rebalance_experts(loads, SLOTS, groups, NODES if groups > 1 else 1, RANKS, policy=policy)
    cluster = make_cluster(RANKS, SLOTS)
    return measure_balancedness(sum_by_rank(share_evenly(loads, Placement(cluster, replicas)), cluster))


def measure_speed(given: argparse.Namespace) -> None:
    """Time all layers at DeepSeek-V3's size, on one core, medians of several, in turns with EPLB's Python."""
    print(f"first calls: {time_first_calls()}")
    reference = load_reference(given.eplb) if given.eplb else None
    if reference is None:
        print("EPLB's Python is not timed; give --eplb FILE")
    for sigma in SIGMAS:
        loads = np.random.default_rng(0).lognormal(0, sigma, (LAYERS, EXPERTS)) * 1000
        before = make_home_placement(LAYERS, EXPERTS, RANKS, 1)
        noisy = loads * np.random.default_rng(1).lognormal(0, 0.1, (9, LAYERS, EXPERTS))
        counts = np.rint(loads).astype(np.int64)
        cloned = plan_clones(noisy[:8], before).placement
        free = Placement(make_cluster(RANKS, SLOTS), rebalance_experts(loads, SLOTS, 1, 1, RANKS)[0])
        calls: dict[str, Callable[[], Any]] = {
            "global policy": partial(rebalance_experts, loads, SLOTS, 1, 1, RANKS),
            "by node": partial(rebalance_experts, loads, SLOTS, GROUPS, NODES, RANKS),
            "spill": partial(rebalance_experts, loads, SLOTS, GROUPS, NODES, RANKS, policy="spill"),
            "deepseek policy": partial(rebalance_experts, loads, SLOTS, 1, 1, RANKS, policy="deepseek"),
            "split, homes and clones": partial(split_tokens, counts, cloned),
            "split, free placement": partial(split_tokens, counts, free),
            "shares, layer by layer": partial(run_each, share_tokens, list_layers(counts, cloned)),
            "clones, from none": partial(plan_clones, noisy[:8], before),
            "clones, from the last": partial(plan_clones, noisy[1:], cloned),
            "clones, one forecast": partial(plan_clones, noisy[8], before),
            "moves": partial(plan_moves, before, cloned),
        }
        if reference is not None:
            calls["EPLB global"] = partial(reference, loads, 1, 1)
            calls["EPLB by node"] = partial(reference, loads, GROUPS, NODES)
        times = time_in_turns(calls)
        print(f"sigma {sigma}, milliseconds: " + ", ".join(f"{name} {1000 * spent:.1f}" for name, spent in times.items()))
        if reference is not None:
            print(
                f"  EPLB over ours: global {times['EPLB global'] / times['global policy']:.0f} times, "
                f"by node {times['EPLB by node'] / times['by node']:.0f} times",
                flush=True,
            )


def list_layers(counts: Array, placement: Placement) -> list[tuple[Array, Placement, Array]]:
    """Return what `share_tokens` takes of each layer: its counts spread over a source per rank, its part of the placement."""
    assert placement.homes is not None
    ranks = placement.cluster.ranks
    spread = np.random.default_rng(2).multinomial(counts, np.full(ranks, 1 / ranks)).transpose(0, 2, 1).copy()
    return [
        (row, Placement(placement.cluster, placement.experts[layer][None], placement.homes[layer][None]), np.arange(ranks))
        for layer, row in enumerate(spread)
    ]


def time_in_turns(calls: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Return the median seconds of each call; each round makes every call once, after one that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_:
                spent[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in spent.items()}


def load_reference(path: Path) -> Callable[[Array, int, int], Any]:
    """Return a call of EPLB's published function, on one thread."""
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("eplb_reference", path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda loads, groups, nodes: module.rebalance_experts(torch.from_numpy(loads), SLOTS, groups, nodes, RANKS)


def time_first_calls() -> str:
    """Return what a fresh process spends on its first plan, with nothing compiled yet and with the cache filled."""
    code = (
        "import numpy as np; from counterflow.balance import *; w = np.random.default_rng(0).lognormal(0, 1, (2, 16)); "
        "rebalance_experts(w, 24, 4, 4, 8); rebalance_experts(w, 24, 4, 4, 8, policy='spill'); "
        "p = make_home_placement(2, 16, 8, 1); "
        "p = plan_clones(w, p).placement; split_tokens(np.rint(w * 100).astype(int), p)"
    )
    spent = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_CACHE_DIR": cache})
            spent.append(time.perf_counter() - begin)
    return f"{spent[0]:.1f} s once per installation, all compiled; {spent[1]:.1f} s per process after that, imports included"


def measure_growth(given: argparse.Namespace) -> None:
    """Time one layer as ranks and experts double, over slots times log(slots), the smallest being 1."""
    first: dict[str, float] = {}
    for ranks in SIZES:
        slots = 3 * ranks
        cluster = make_cluster(ranks, slots)
        cases = [np.random.default_rng(seed).lognormal(0, 1, (1, 2 * ranks)) for seed in range(max(3, given.seeds))]
        before = make_home_placement(1, 2 * ranks, ranks, 1)
        counts = [np.rint(case * 1000).astype(np.int64) for case in cases]
        cloned = [plan_clones(case, before).placement for case in cases]
        later = [case * np.random.default_rng(9).lognormal(0, 0.1, (8, *case.shape)) for case in cases]
        calls: dict[str, Callable[[], Any]] = {
            "global policy": partial(run_each, partial(plan_placement, policy="global"), [(case, cluster) for case in cases]),
            "split": partial(run_each, split_tokens, list(zip(counts, cloned, strict=True))),
            "clones": partial(run_each, plan_clones, list(zip(later, cloned, strict=True))),
        }
        times = {name: spent / len(cases) for name, spent in time_in_turns(calls).items()}
        scale = slots * np.log(slots)
        for name, spent in times.items():
            first.setdefault(name, spent / scale)
        print(
            f"{2 * ranks} experts, {ranks} ranks, {slots} slots: "
            + ", ".join(f"{name} {1000 * spent:.2f} ms ({spent / scale / first[name]:.2f})" for name, spent in times.items()),
            flush=True,
        )


def run_each(call: Callable[..., Any], cases: list[Any]) -> None:
    """Make a call for each case."""
    for case in cases:
        call(*case)


def measure_split(given: argparse.Namespace) -> None:
    """Compare the split with a linear program at full size."""
    worst = 0.0
    for seed in range(given.seeds):
        random = np.random.default_rng(seed)
        loads = random.lognormal(0, 1, (LAYERS, EXPERTS)) * 1000
        placement = plan_clones(loads, make_home_placement(LAYERS, EXPERTS, RANKS, 1)).placement
        counts = random.poisson(loads)
        slowest = sum_by_rank(split_tokens(counts, placement), placement.cluster).max(1)
        for layer in range(LAYERS):
            best = solve_split(counts[layer], placement.experts[layer], placement.cluster.rank_of_slot)
            worst = max(worst, float(slowest[layer] - best))
    print(
        f"{given.seeds * LAYERS} layers: at most {worst:.3f} tokens above the linear program, exact in whole tokens where below 1"
    )


def measure_homes(given: argparse.Namespace) -> None:
    """Compare re-homing, moves free and no clones, with sorting columns against each other; time it with forecasts and prices."""
    for ranks, columns, sigma in ((64, 4, 0.5), (64, 4, 1.0), (8, 8, 0.5), (8, 32, 1.0)):
        rows = []
        for seed in range(max(8, given.seeds)):
            random = np.random.default_rng(seed)
            loads = random.lognormal(0, sigma, (ranks, columns))
            plan = plan_homes(loads.reshape(1, -1), make_home_placement(1, loads.size, ranks, 0), 10**7)
            rows.append(
                [plan.before[0], plan.after[0], min(sort_columns(loads, random) for _ in range(10)) / loads.sum() * ranks]
            )
        before, after, best = np.transpose(rows)
        print(
            f"{ranks} ranks of {columns} experts, sigma {sigma}: slowest rank {before.mean():.4f} -> {after.mean():.4f}, "
            f"over the best of ten sorted: mean {(after / best).mean():.4f}, worst {(after / best).max():.4f}",
            flush=True,
        )
    calls: dict[str, Callable[[], Any]] = {}
    for sigma in SIGMAS:
        random = np.random.default_rng(0)
        forecasts = random.lognormal(0, sigma, (4, EXPERTS)) * random.lognormal(0, 0.1, (8, 4, EXPERTS))
        for clones in (0, 1):
            placement = make_home_placement(4, EXPERTS, RANKS, clones)
            calls[f"sigma {sigma}, {clones} clones"] = partial(plan_homes, forecasts, placement, 1000)
    print("4 layers, milliseconds: " + ", ".join(f"{name} {1000 * spent:.1f}" for name, spent in time_in_turns(calls).items()))


def sort_columns(loads: Array, random: np.random.Generator) -> float:
    """Return the slowest rank's load after columns, shuffled first, have each been sorted against the others' sums many times."""
    loads = random.permuted(loads, axis=0)
    for _ in range(200):
        for column in loads.T:
            column[np.argsort(column - loads.sum(1))] = np.sort(column)
    return float(loads.sum(1).max())


def measure_workloads(given: argparse.Namespace) -> None:
    """Replay the nine kinds and the recording under exact and automatic plans, steps of 8 micro-batches, beside what is asked.

    Bytes are those of the micro-batches that are scored; beside them, those of homes that moved before are counted too.
    """
    cases: list[tuple[str, Array, int, int, int, dict[str, tuple[float, float]]]] = []
    for experts, ranks, nodes in ((64, 8, 1), (128, 16, 2)):
        for kind in WORKLOADS:
            drifts = kind == "drift"
            asked = {"exact": (0.99, 0.97) if drifts else (0.995, 0.985), "auto": (0.985, 0.96) if drifts else (0.99, 0.97)}
            for seed in range(given.seeds):
                counts = make_workload(kind, 160, 2, experts, ranks, seed=seed)
                cases.append((f"{kind}, {ranks} ranks on {nodes} nodes, seed {seed}", counts, ranks, nodes, 8, asked))
    if given.trace.exists():
        cases.append((given.trace.name, read_trace(given.trace), 8, 1, 1, {"auto": (0.995, 0.985)}))
    for name, counts, ranks, nodes, interval, asked in cases:
        exact = exact_early = 0.0
        for plan, (mean, p5) in asked.items():
            done = replay_trace(counts, ranks, 1, interval, nodes, None if interval == 1 else 48, plan)
            assert done.account is not None
            scores = done.balancedness["counterflow"]
            low = np.percentile(scores, 5)
            missed = "" if scores.mean() >= mean and low >= p5 else " MISSED"
            tiers = {tier: float(sums.sum()) for tier, sums in done.account.sum_bytes().items()}
            early = float(done.account.early.sum()) * HOME * done.account.costs.expert_bytes
            sent = sum(tiers.values())
            if plan == "exact":
                exact, exact_early = sent, early
            whole = (sent + early) / max(1.0, exact + exact_early)
            part = f"; {sent / exact:.3f} of exact's, {whole:.3f} with the homes that moved before" if exact else ""
            print(
                f"{name}, {plan}: {scores.mean():.4f} {low:.4f}, asked {mean} {p5}{missed}; "
                f"force-balanced {done.account.share_of_ideal('counterflow'):.4f}; MB a layer and micro-batch: "
                + ", ".join(f"{tier} {total / scores.size / 1e6:.0f}" for tier, total in tiers.items())
                + part,
                flush=True,
            )


def measure_exact(given: argparse.Namespace) -> None:
    """Time a layer's exact plan at DeepSeek-V3's size, its split included, and say how balanced it is and where clones come from.

    Of every layer the median of several calls counts, one layer a call; asked: 300 us.
    """
    placement, shared = add_shared_slots(make_home_placement(1, EXPERTS, RANKS, 0, NODES), 1)
    cases = {f"sigma {sigma}": make_layers(sigma) for sigma in SIGMAS}
    for kind in WORKLOADS:
        cases[kind] = make_workload(kind, 6, 8, EXPERTS, RANKS, 4096 * RANKS, 8).reshape(-1, EXPERTS)
    for name, layers in cases.items():
        for prices_name, prices in (("free", FREE), ("priced", Costs().price_clones(RANKS))):
            plans = [plan_exact(row[None], placement, shared, prices) for row in layers]
            calls: dict[str, Callable[[], Any]] = {
                str(index): partial(plan_exact, row[None], placement, shared, prices) for index, row in enumerate(layers)
            }
            spent = np.array(list(time_in_turns(calls).values())) * 1e6
            scores = measure_balancedness(np.stack([sum_by_rank(plan.tokens, placement.cluster)[0] for plan in plans]))
            near, far = (np.mean([side.sum() for side in sides]) for sides in zip(*((p.near, p.far) for p in plans), strict=True))
            print(
                f"{name}, {prices_name}: {np.median(spent):.0f} us a layer, 95th percentile {np.percentile(spent, 95):.0f}; "
                f"balancedness {scores.mean():.4f} {np.percentile(scores, 5):.4f}; clones a layer {near:.1f} in node, {far:.1f} "
                f"across; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


def make_layers(sigma: float) -> Array:
    """Return ``int64[layers, experts]``, log-normal loads of DeepSeek-V3's size; no expert gets a token twice."""
    shares = np.minimum(np.random.default_rng(0).lognormal(0, sigma, (LAYERS, EXPERTS)), 8.0 * EXPERTS)
    shares = np.minimum(shares / shares.sum(1, keepdims=True), 1 / 8)
    return np.rint(shares * 4096 * 8 * RANKS).astype(np.int64)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "recorded": measure_recorded,
    "drifting": measure_drifting,
    "placement": measure_placement,
    "split": measure_split,
    "homes": measure_homes,
    "workloads": measure_workloads,
    "exact": measure_exact,
    "speed": measure_speed,
    "growth": measure_growth,
}


if __name__ == "__main__":
    main()
