"""Transformer Engine's models beside plain Megatron's: `python -m benchmarks.te [--only blockwise] [--seeds 1234] [--steps 20]`.

Trains the whole grid of `tests/distributed/te_cases.py` on four CPU ranks over the stand-in, from one checkpoint for each seed
and model. Says of each run whether its losses and gradient norms are those of plain Megatron to all digits that the log prints,
else by how much they differ, and what the modules did. Ends with status 1 where a run fails, leaves weight gradients in a queue,
or differs although nothing is rounded in other groups, or by more than `ALLOWED`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from data import prepare_text
from te_cases import list_cases
from tests.support.comparing import find_difference
from tests.support.forked_ranks import RanksError
from tests.support.run_cases import Runs

STEPS = 20
# Relative, on losses, where numbers are rounded in other groups: clones, other tokens under one scale, clipping.
ALLOWED = 5e-3


def compare(runs: Runs, case: dict[str, Any], *, is_rounded: bool) -> tuple[bool, str]:
    """Tell whether a case's losses and norms are those of its reference, or near if it ``is_rounded``; say how near."""
    try:
        run, reference = runs[case["name"]], runs[case["reference"]]
    except RanksError as error:
        return False, str(error)
    same = print_steps(run) == print_steps(reference)
    loss, norm = find_difference(run, reference, "loss"), find_difference(run, reference, "grad_norm")
    work = {kind: [one.get(kind, 0) for one in run["work"]] for kind in ("quantized", "weights", "queued", "left")}
    said = "all printed digits" if same else f"loss {loss:.1e} norm {norm:.1e}"
    return (same or (is_rounded and loss <= ALLOWED)) and not any(work["left"]), f"{said:<32} {work}"


def print_steps(run: dict[str, Any]) -> list[str]:
    """Return a run's losses and gradient norms as Megatron's log prints them."""
    return [f"{step['loss']:.6E} {step['grad_norm']:.3f}" for step in run["steps"]]


def main() -> None:
    """Run the chosen part of the grid and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--seeds", nargs="+", default=["1234", "4321"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clip", action="store_true", help="clip gradients, by a norm that each layout sums in another order")
    options = parser.parse_args()
    further = ["--clip-grad", "1.0"] if options.clip else []
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(Path(folder) / "text", max_bytes=2**21)
        for seed in options.seeds:
            directory = Path(folder) / seed
            directory.mkdir()
            cases = list_cases(text, directory, options.steps, seed, *further)
            runs = Runs("te_worker", cases, directory)
            for case in cases:
                if case["name"] != case["reference"] and any(part in case["name"] for part in options.only):
                    fits, said = compare(runs, case, is_rounded=options.clip or case.get("is_rounded", False))
                    is_good &= fits
                    print(f"{seed} {case['name']:<44} {said}", flush=True)
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
