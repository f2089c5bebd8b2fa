"""Transformer Engine's layers in DeepSpeed beside plain DeepSpeed: `python -m benchmarks.deepspeed_engine [--clip]`.

Trains a pipeline of its layers for 20 steps on four CPU ranks, over the CPU platform's stand-in, in BF16 and by recipes of FP8:
under plain DeepSpeed and under schedules. Says by how much losses and gradient norms differ, and ends with status 1 where that is
more than 1e-6. With ``--clip`` gradients are clipped; then the last bit of a norm, which each layout sums in another order, flips
roundings to BF16, and the figures are for reading only.
"""

import argparse
import tempfile
from pathlib import Path

from test_deepspeed_splits import RECIPES, make_engine_cases, run_cases
from tests.support.comparing import find_difference

STEPS, MOST, CLIPPING = 20, 1e-6, 0.5
BF16 = "bf16"


def main() -> None:
    """Run the chosen recipes and print a line for each comparison."""
    names = [recipe or BF16 for recipe in RECIPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clip", action="store_true")
    options = parser.parse_args()
    is_good = True
    for name in options.recipes:
        recipe = str(None if name == BF16 else name)
        cases = make_engine_cases(options.steps, CLIPPING if options.clip else 0.0)
        chosen = {case: what for case, what in cases.items() if case.split()[0] == recipe}
        with tempfile.TemporaryDirectory() as folder:
            done = run_cases("deepspeed_engine_worker.py", chosen, Path(folder))
        plain = done.pop(f"{recipe} None")
        for case, run in done.items():
            losses, norms = (find_difference(run, plain, number) for number in ("loss", "grad_norm"))
            is_good &= options.clip or max(losses, norms) <= MOST
            print(f"{name:<10} {case.split()[1]:<10} losses {losses:.1e} apart, norms {norms:.1e}", flush=True)
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
