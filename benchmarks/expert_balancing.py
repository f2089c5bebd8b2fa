"""Expert balancing while a model trains: is it exact, does it balance, what does it cost? `make bench-eplb ARGS="exact balance"`.

exact: the example's model made small, from the same weights, with clones drawn anew for every step, beside plain Megatron.
balance: the example's own model; balancedness with homes alone and as it was. overhead: its step time with ``--cf-eplb`` over
that without, the router forced to balance, in turns: run it on a quiet machine. device: nine kinds of load on an emulated device
of eight ranks, beside a router that is forced to balance (`device_contestants`): an hour a seed.
"""

import argparse
import math
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.device_contestants import CONTESTANTS, measure_device
from counterflow.balance import WORKLOADS
from data import prepare_text
from ranks import start_ranks
from tests.support import ROOT
from tests.support.checkpoints import measure_difference, read_tensors
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.run_cases import Case, Run, Runs
from tests.support.training import OVERLAPPED, SCHEDULES, SHARDED, TWO_STAGES, Cases, list_base_flags
from train import STEP, read_flags

# Micro-batches of 4 ranks: 8, of 8 ranks with two replicas of every expert: 4, the fewest that a V of two ranks takes.
EXACT = """
    --num-experts 8 --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk 3 --global-batch-size 16
    --eval-interval 1000 --eval-iters 0
""".split()
KINDS: dict[str, list[str]] = {"plain": [], "sharded": SHARDED, "bf16": [*OVERLAPPED, "--bf16"]}
LAYOUTS = {
    "PP 2 x EP 2, dualpipev": [*TWO_STAGES, "--cf-schedule", "dualpipev"],
    "EP 4": ["--expert-model-parallel-size", "4"],
}


def main() -> None:
    """Measure what is asked for and print it; ends with status 1 where training is not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: exact, balance)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234], help="a run of everything per seed (default: 1234)")
    parser.add_argument("--steps", type=int, help="steps of each training (default: 30; balance: 100)")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="exact: of every expert (default: 1 2)")
    parser.add_argument("--turns", type=int, default=5, help="overhead: runs with and without, in turns (default: 5)")
    parser.add_argument(
        "--kinds", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), help="device: of load (default: all)"
    )
    parser.add_argument(
        "--stretch", type=float, default=100.0, help="device: by how much sleeps are longer; 0: none (default: 100)"
    )
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="device: that the ranks are on (default: 1)")
    parser.add_argument(
        "--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, help="device: who trains (default: all)"
    )
    given = parser.parse_args()
    for part in given.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; allowed: {', '.join(PARTS)}")
    worst = 0.0
    for part in given.parts or ("exact", "balance"):
        print(f"== {part}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            worst = max(worst, PARTS[part](given, Path(folder)))
    sys.exit(worst > TOLERANCE)


def measure_exactness(given: argparse.Namespace, directory: Path) -> float:
    """Print each case's largest differences from plain Megatron; return the largest of all in fp32."""
    steps, largest = given.steps or 30, 0.0
    for seed in given.seeds:
        for replicas in given.replicas:
            folder = directory / f"{seed}-{replicas}"
            folder.mkdir()
            # Group by group, so that a run that is stopped has printed what it found.
            for group in group_exact_cases(folder, seed, steps):
                reference, *others = Runs("eplb_worker", group, folder, 4 * replicas).values()
                for run in others:
                    found = compare(run, reference, steps)
                    if reference["name"] != "bf16":
                        largest = max(largest, *found)
                    print(
                        f"seed {seed}, expert replicas {replicas}: {run['name']:34} {describe(found, run['clones'])}", flush=True
                    )
    print(f"largest difference in fp32 {largest:.1e}, allowed {TOLERANCE:g}: {'PASS' if largest <= TOLERANCE else 'NOT REACHED'}")
    return largest


def group_exact_cases(directory: Path, seed: int, steps: int) -> list[list[Case]]:
    """Return groups of cases, in each the reference first: the weights that all start from, then each optimizer, and bf16."""
    text = prepare_text(directory.parent / "text", max_bytes=2**21)
    base = [*list_base_flags(text, directory.parent), *EXACT, *TWO_STAGES, "--seed", str(seed)]
    groups = [Cases(directory, base, steps) for _ in ("initial", *KINDS)]
    groups[0].add("initial", plugin=False, steps=1, save=1, seed=seed)
    start = groups[0].start_from("initial")
    for group, (kind, chosen) in zip(groups[1:], KINDS.items(), strict=True):
        group.add(kind, start, chosen, plugin=False, save=steps, seed=seed)
        for clones, (schedule, flags) in product((1, 2), SCHEDULES.items()):
            on = ["--cf-eplb", "--cf-eplb-clones-per-rank", str(clones)]
            group.add(f"{schedule}, clones {clones}, {kind}", start, chosen, flags, on, save=steps, seed=seed)
    return list(groups)


def compare(run: Run, reference: Run, steps: int) -> tuple[float, float, float]:
    """Return the largest relative differences of losses, of gradient norms, and of weights and optimizer state at the end."""
    loss, norm = (find_difference(run, reference, name) for name in ("loss", "grad_norm"))
    if math.isinf(loss):
        return loss, norm, math.inf
    found, expected = (read_tensors(one["directory"] / one["name"], steps) for one in (run, reference))
    if found.keys() != expected.keys():
        return loss, norm, math.inf
    # Random states are kept by pipeline rank, and differ between layouts.
    compared = [key for key in expected if not key.startswith("rng_state")]
    return loss, norm, max(measure_difference(found[key], expected[key]) for key in compared)


def describe(found: tuple[float, float, float], clones: dict[str, Any]) -> str:
    """Return a line of a case's differences and of its clones."""
    loss, norm, state = found
    same = "all as their homes, bit for bit" if not clones["wrong"] else f"{clones['wrong']} UNLIKE THEIR HOMES"
    return (
        f"loss {loss:.1e}, gradient norm {norm:.1e}, checkpoint {state:.1e}; {clones['changes']} placements, "
        f"{clones['computed']} clones computed {clones['tokens']} tokens, {same}"
    )


def measure_balance(given: argparse.Namespace, directory: Path) -> float:
    """Print mean balancedness over the steps of the example's model, with homes alone and as it was, for one and two clones."""
    steps = given.steps or 100
    text = prepare_text(directory / "text")
    for seed in given.seeds:
        cases = Cases(directory, [*list_example_flags(text, directory), "--seed", str(seed)], steps)
        for (layout, flags), clones in product(LAYOUTS.items(), (1, 2)):
            on = ["--cf-eplb", "--cf-eplb-clones-per-rank", str(clones)]
            cases.add(f"{layout}, clones {clones}", flags, on, plans="made")
        for name, run in Runs("eplb_worker", cases, directory).items():
            # The first step has homes alone.
            said = run["clones"]["said"][1:]
            before, after = ([step[key] for step in said] for key in ("balancedness before", "balancedness"))
            sent, size = (statistics.mean(step[key] for step in said) for key in ("clones", "MB"))
            print(
                f"seed {seed}, {name:34} {steps} steps: mean {statistics.mean(before):.4f} -> {statistics.mean(after):.4f}, "
                f"lowest step {min(before):.4f} -> {min(after):.4f}; {sent:.1f} clones and {size:.2f} MB sent a step",
                flush=True,
            )
    return 0.0


def measure_overhead(given: argparse.Namespace, directory: Path) -> float:
    """Print the median step time with balancing over that without, where there is nothing to balance."""
    steps = given.steps or 30
    text = prepare_text(directory / "text")
    for layout, flags in LAYOUTS.items():
        base = [*list_example_flags(text, directory), *flags, "--train-iters", str(steps), "--moe-router-force-load-balancing"]
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(given.turns):
            for is_on in times:
                times[is_on] += time_steps([*base, *(["--cf-eplb"] if is_on else [])], directory)[steps // 6 :]
        off, on = (statistics.median(times[is_on]) for is_on in (False, True))
        print(
            f"{layout}: a step takes {off:.0f} ms without, {on:.0f} ms with --cf-eplb, medians of {len(times[True])} in "
            f"{given.turns} turns: {100 * (on / off - 1):+.1f} %",
            flush=True,
        )
    return 0.0


def list_example_flags(text: Path, directory: Path) -> list[str]:
    """Return the flags of the example as it trains on the CPU, without a layout; it neither saves nor evaluates."""
    return [
        *read_flags("deepseek-v3-small.args"),
        *read_flags("cpu.args"),
        *("--cf-platform", "cpu", "--distributed-timeout-minutes", "2"),
        *("--data-path", str(text), "--data-cache-path", str(directory / "cache"), "--eval-interval", "1000000"),
        *("--eval-iters", "0"),
    ]


def time_steps(flags: list[str], directory: Path) -> list[float]:
    """Return the milliseconds of every step of one run, as its log says."""
    lines: list[str] = []
    script = str(ROOT / "examples" / "pretrain_moe" / "pretrain_moe.py")
    start_ranks(4, [sys.executable, "-W", "ignore", "-m", "counterflow.launch", script, *flags], directory / "logs", lines.append)
    return [float(match["ms"]) for line in lines if (match := STEP.search(line))]


PARTS = {"exact": measure_exactness, "balance": measure_balance, "overhead": measure_overhead, "device": measure_device}

if __name__ == "__main__":
    main()
