"""HybridModel beside plain Megatron's: `python -m benchmarks.hybrid [--models "PP 2"] [--schedules dualpipev] [--seeds 1234]`.

Trains a pattern of attention, dense and expert layers for 20 steps on four CPU ranks, under plain Megatron and under each
schedule, with clones and without, with the plain and the distributed optimizer, from one checkpoint for each seed. Says by how
much losses and gradient norms differ, and ends with status 1 where they do by more than the tests allow.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cases import DATA
from data import prepare_text
from eplb_cases import CLONES
from hybrid_cases import GPT_ALONE, MADE_OF_LAYERS, PATTERN, SCRIPT
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.forked_ranks import RanksError
from tests.support.run_cases import Runs
from tests.support.training import SHARDED, drop_flags, list_base_flags, start_from

STEPS = 20
STRAIGHT, TWO_CHUNKS = "straight", "two chunks"
SCHEDULES = {
    "1f1b": STRAIGHT,
    "gpipe": STRAIGHT,
    "zb-h1": STRAIGHT,
    "interleaved": TWO_CHUNKS,
    "zbv": TWO_CHUNKS,
    "dualpipev": TWO_CHUNKS,
    "dualpipe": TWO_CHUNKS,
    "auto": TWO_CHUNKS,
    str(DATA / "searched-v.csv"): TWO_CHUNKS,
}
EXPERTS_ON_TWO = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
FOUR = "--pipeline-model-parallel-size 4 --global-batch-size 8"
# By name: flags, and the pattern for one chunk on each rank and for two.
MODELS = {
    "PP 2": (EXPERTS_ON_TWO, {STRAIGHT: "*-*E|*E*E", TWO_CHUNKS: "*-|*E|*E*|E"}),
    "PP 4": (FOUR, {STRAIGHT: "*-*E|*E|*E|*E*E", TWO_CHUNKS: "*-|*E|*|E|*|E|*|E*E"}),
    "MTP": (EXPERTS_ON_TWO, {STRAIGHT: "*-*E|*E*E/*E", TWO_CHUNKS: "*-|*E|*E*|E/*E"}),
}
# One replica alone; expert-parallel size 1, where there is nothing to balance; another number of ranks than the file's.
LEFT_OUT = {"PP 4": ("dualpipe", str(DATA / "searched-v.csv"))}
OPTIMIZERS: dict[str, list[str]] = {"plain": [], "sharded": SHARDED}


def list_cases(model: str, schedules: list[str], seed: str, text: Path, directory: Path) -> list[dict[str, Any]]:
    """Return the runs of one model and seed: first weights, plain Megatron under both optimizers, then each schedule."""
    own, patterns = MODELS[model]
    base = drop_flags([*list_base_flags(text, directory), *MADE_OF_LAYERS, *own.split()], *GPT_ALONE)
    base += ["--seed", seed, PATTERN]
    first = [*base, patterns[STRAIGHT], "--train-iters", "1", "--save", str(directory), "--save-interval", "1"]
    steps = [*start_from(directory), "--train-iters", str(STEPS)]
    cases: list[dict[str, Any]] = [{"name": "first weights", "plugin": False, "flags": first}]
    for optimizer, flags in OPTIMIZERS.items():
        plain = [*base, patterns[STRAIGHT], *steps, *flags]
        cases.append({"name": f"megatron, {optimizer}", "plugin": False, "flags": plain})
        for schedule in schedules:
            for kind, clones in {"": [], ", clones": CLONES[1]}.items():
                if schedule in LEFT_OUT.get(model, ()) or (clones and model == "PP 4"):
                    continue
                chosen = [*base, patterns[SCHEDULES[schedule]], *steps, *flags, "--cf-schedule", schedule, *clones]
                name = f"{Path(schedule).name}{kind}, {optimizer}"
                cases.append({"name": name, "plugin": True, "flags": chosen, "reference": f"megatron, {optimizer}"})
    return [{**case, "script": SCRIPT} for case in cases]


def compare(runs: Runs, case: dict[str, Any]) -> tuple[bool, str]:
    """Tell whether a case's steps are those of its reference, and say by how much they differ."""
    try:
        run, reference = runs[case["name"]], runs[case["reference"]]
    except RanksError as error:
        return False, str(error)
    worst = find_difference(run, reference, "loss", "grad_norm", "mtp_loss")
    return worst <= TOLERANCE, f"{run['seconds']:5.1f} s  {worst:.1e}"


def main() -> None:
    """Run the chosen part of the matrix and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--seeds", nargs="+", default=["1234", "4321"])
    options = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(Path(folder) / "text", max_bytes=2**21)
        for model in options.models:
            for seed in options.seeds:
                directory = Path(folder) / f"{model}, {seed}"
                directory.mkdir()
                cases = list_cases(model, options.schedules, seed, text, directory)
                runs = Runs("eplb_worker", cases, directory)
                for case in cases:
                    if "reference" in case:
                        agrees, said = compare(runs, case)
                        is_good &= agrees
                        print(f"{model:<5} {seed:<5} {case['name']:<32} {'agrees ' if agrees else 'DIFFERS'} {said}", flush=True)
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
