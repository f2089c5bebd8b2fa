"""What each schedule works with: `python benchmarks/works_with.py [--only WORD] [--schedules dualpipev]`.

Trains a small model for a few steps on four CPU ranks under plain Megatron 1F1B and under each schedule, from one
checkpoint, with each combination of flags in turn, and says by how much losses and gradient norms differ.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples" / "pretrain_moe"), str(ROOT / "tests" / "distributed")]

STEPS = 4
TOLERANCE = 1e-5
REFERENCE = "megatron 1f1b"


@dataclass(frozen=True)
class Combination:
    """Flags that are added to the small model's, and flags that are taken away from it.

    A flag taken away goes with its values. ``by_schedule`` adds what only some schedules need; the reference is
    named `REFERENCE` there.
    """

    name: str
    add: str = ""
    drop: tuple[str, ...] = ()
    by_schedule: dict[str, str] = field(default_factory=dict)
    model: str = "moe"


DENSE = ("--num-experts", "--moe-layer-freq", "--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size",
    "--moe-router-topk", "--moe-router-num-groups", "--moe-router-group-topk", "--moe-router-score-function",
    "--moe-router-topk-scaling-factor", "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate",
    "--moe-router-load-balancing-type", "--moe-router-dtype", "--moe-token-dispatcher-type",
    "--expert-model-parallel-size")  # fmt: skip
UNTIE = "--untie-embeddings-and-output-weights"
SHARDED = "--use-distributed-optimizer"
OVERLAPPED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"

COMBINATIONS = (
    Combination("plain"),
    Combination("tied", drop=(UNTIE,)),
    Combination("tied, sharded", SHARDED, drop=(UNTIE,)),
    Combination("tied, overlap", OVERLAPPED, drop=(UNTIE,)),
    Combination("tied, bf16, overlap", f"--bf16 {OVERLAPPED}", drop=(UNTIE,)),
    Combination("tied, per-token loss", "--calculate-per-token-loss", drop=(UNTIE,)),
    Combination("MTP", "--mtp-num-layers 1"),
    Combination("MTP, overlap", f"--mtp-num-layers 1 {OVERLAPPED}"),
    Combination("MTP, tied", "--mtp-num-layers 1", drop=(UNTIE,)),
    Combination("MTP, tied, overlap", f"--mtp-num-layers 1 {OVERLAPPED}", drop=(UNTIE,)),
)

SCHEDULES = ("1f1b", "interleaved", "dualpipev")


def list_flags(combination: Combination, schedule: str, text: Path, directory: Path) -> list[str]:
    """Return the whole command line of one run."""
    from cases import SCHEDULES as CHOOSE
    from cases import SMALL, TWO_STAGES
    from train import read_flags

    flags = [*read_flags("deepseek-v3-small.args"), *read_flags("cpu.args"), *SMALL, *TWO_STAGES]
    flags += ["--data-path", str(text), "--data-cache-path", str(directory / "cache"), "--train-iters", str(STEPS)]
    flags = drop_flags(flags, (SHARDED, *combination.drop))
    flags += combination.add.split()
    extra = combination.by_schedule.get(schedule)
    if schedule in CHOOSE:
        flags += CHOOSE[schedule][:2] if extra is not None else CHOOSE[schedule]
    return flags + (extra or "").split()


def drop_flags(flags: list[str], dropped: tuple[str, ...]) -> list[str]:
    """Take flags with their values out of a command line."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word in dropped
        if not dropping:
            kept.append(word)
    return kept


def list_cases(combination: Combination, schedules: list[str], text: Path, directory: Path) -> list[dict[str, Any]]:
    """Return the runs of one combination: the weights that all start from, the reference and the schedules."""
    first = list_flags(combination, REFERENCE, text, directory)
    first[first.index("--train-iters") + 1] = "1"
    cases = [{"name": "initial", "plugin": False, "flags": [*first, "--save", str(directory), "--save-interval", "1"]}]
    start = ["--load", str(directory), "--finetune", "--no-load-optim", "--no-load-rng"]
    for schedule in (REFERENCE, *schedules):
        flags = [*list_flags(combination, schedule, text, directory), *start]
        cases.append({"name": schedule, "plugin": schedule != REFERENCE, "flags": flags, "may_fail": True})
    return cases


def run_cases(cases: list[dict[str, Any]], directory: Path) -> Iterator[dict[str, Any]]:
    """Run the cases in turn, many in a start; one that ends its start badly is left out of the next."""
    from ranks import RankError, start_ranks

    given, results = directory / "cases.json", directory / "results.json"
    worker = str(ROOT / "tests" / "distributed" / "worker.py")
    while cases:
        given.write_text(json.dumps(cases))
        results.write_text("[]")
        error = "ended without a word"
        try:
            start_ranks(4, [sys.executable, "-W", "ignore", worker, str(given), str(results)], directory / "logs")
        except RankError as caught:
            error = str(caught)
        done = json.loads(results.read_text())
        yield from done
        cases = cases[len(done) :]
        if cases:
            yield {"name": cases[0]["name"], "steps": [], "evaluations": [], "error": error}
            cases = cases[1:] if cases[0]["name"] != "initial" else []


def compare(run: dict[str, Any], reference: dict[str, Any]) -> str:
    """Say how far a run's losses, gradient norms and evaluations are from the reference's."""
    if run["error"] is not None:
        return str(run["error"])
    pairs = [
        (own[name], other[name])
        for own, other in zip(run["steps"], reference["steps"], strict=True)
        for name in ("loss", "grad_norm")
    ]
    pairs += list(zip(run["evaluations"], reference["evaluations"], strict=True))
    worst = max(abs(own - other) / abs(other) for own, other in pairs)
    return f"{'agrees' if worst <= TOLERANCE else 'DIFFERS'} ({worst:.1e})"


def main() -> None:
    """Run the chosen part of the matrix and print a line for each run."""
    from data import prepare_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="combinations whose name is this, or starts so with a * (repeatable)")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(Path(folder) / "text", max_bytes=2**21)
        for number, combination in enumerate(COMBINATIONS):
            if options.only and not any(Path(combination.name).match(only) for only in options.only):
                continue
            directory = Path(folder) / str(number)
            directory.mkdir()
            reference: dict[str, Any] = {"steps": [], "evaluations": []}
            for run in run_cases(list_cases(combination, options.schedules, text, directory), directory):
                if run["name"] == REFERENCE:
                    reference = run
                said = compare(run, reference) if run["name"] != "initial" or run["error"] else ""
                if said:
                    print(f"{combination.name:<28} {run['name']:<14} {said}", flush=True)


if __name__ == "__main__":
    main()
