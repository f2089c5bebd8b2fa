"""Just-in-time clones beside plain Megatron: `python -m benchmarks.just_in_time [--cases dualpipev] [--seeds 1234] [--steps 30]`.

Trains on four CPU ranks in fp32, with other clones in every micro-batch, from one checkpoint for each seed. Says by how much
losses and gradient norms differ, and ends with status 1 where they do by more than 1e-5, or where a clone had other weights than
its home.
"""

import argparse
import tempfile
from pathlib import Path

from data import prepare_text
from just_in_time_cases import (
    KEEPING,
    MORE_PLAIN,
    MORE_SHARDED,
    PLAIN,
    PREDICTING,
    SEEDS,
    SHARDED_RUNS,
    list_cases,
    name_reference,
)
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.forked_ranks import RanksError
from tests.support.run_cases import Runs

CASES = PLAIN | SHARDED_RUNS | MORE_PLAIN | MORE_SHARDED | KEEPING | PREDICTING
STEPS = 30


def compare(runs: Runs, name: str) -> tuple[bool, str]:
    """Tell whether a case's steps are plain Megatron's, and say by how much they differ."""
    try:
        run, reference = runs[name], runs[name_reference(name)]
    except RanksError as error:
        return False, str(error)
    worst, clones = find_difference(run, reference, "loss", "grad_norm"), run["clones"]
    said = f"{worst:.1e}, {len(run['steps'])} steps, {clones['different_loans']} different loans, {clones['wrong']} clones wrong"
    return worst <= TOLERANCE and not clones["wrong"] and clones["computed"] > 0, said


def main() -> None:
    """Run the chosen part of the grid and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(Path(folder) / "text", max_bytes=2**21)
        for seed in options.seeds:
            directory = Path(folder) / str(seed)
            directory.mkdir()
            runs = Runs("eplb_worker", list_cases(text, directory, options.steps, seed), directory)
            for name in options.cases:
                is_equal, said = compare(runs, name)
                print(f"{'' if is_equal else 'DIFFERS: '}seed {seed}, {name}: {said}", flush=True)
                is_good &= is_equal
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
