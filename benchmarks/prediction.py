"""How far each predictor of loads errs: `python -m benchmarks.prediction TRACE.npz [--warmup 50]`.

The error of each over persistence's, per layer, for plans made every so many micro-batches; the last line is the choice among
them.
"""

import argparse
from pathlib import Path

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.files.loads import read_trace
from counterflow.balance.prediction import PREDICTORS, LoadPredictor

HORIZONS = (1, 5, 20)


def measure_errors(counts: Array, horizon: int, warmup: int) -> dict[str, Array]:
    """Return ``float64[layers]`` for each predictor and for the choice: the mean error over micro-batches from ``warmup`` on."""
    _, layers, experts = counts.shape
    predictor = LoadPredictor(layers, experts, horizon)
    made: dict[str, list[Array]] = {name: [] for name in (*PREDICTORS, "choice")}
    for loads in counts:
        predictor.observe(loads)
        for name, predicted in (predictor.predict_each() | {"choice": predictor.predict()}).items():
            made[name].append(predicted)
    begin = max(warmup, horizon)
    seen = counts[begin:]
    total = np.maximum(seen.sum(-1), 1)
    return {
        name: (np.abs(np.array(predicted[begin - horizon : -horizon]) - seen).sum(-1) / total).mean(0)
        for name, predicted in made.items()
    }


def main() -> None:
    """Print a table per horizon."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--warmup", type=int, default=50)
    given = parser.parse_args()
    counts = read_trace(given.trace)
    for horizon in HORIZONS:
        errors = measure_errors(counts, horizon, given.warmup)
        base = errors["persistence"]
        print(f"{horizon} micro-batches ahead; persistence misses {100 * base.mean():.1f} % of the load; over that, per layer:")
        for name, error in errors.items():
            print(f"  {name:<12}" + "".join(f"{ratio:7.3f}" for ratio in error / base) + f"   mean {(error / base).mean():.3f}")


if __name__ == "__main__":
    main()
