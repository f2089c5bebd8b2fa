"""Schedules in DeepSpeed beside plain DeepSpeed: `python -m benchmarks.deepspeed [--models tied] [--ranks 2] [--seeds 1234]`.

Trains dense, tuple and tied models for 20 steps on four CPU ranks by one script, with gradients clipped: under plain DeepSpeed
with ZeRO-1, under each schedule, and in fp32 also without a pipeline, at ZeRO-0. Says by how much losses and gradient norms
differ, and ends with status 1 where a run differs by more than it may.

In fp32 that is 1e-5. In bf16 a norm that is summed in another order is enough to round some weights to the other side, and after
a few steps such runs are as far apart as bf16 is exact. So the first step has to agree: within 1e-5 where gradients are summed in
fp32, within a rounding where DeepSpeed sums them in bf16, its default. Later steps have to stay within twice the distance that
plain DeepSpeed in bf16 keeps from fp32, or from itself with a clipping threshold that is a millionth larger.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from counterflow.schedule import Costs, lay_v, to_csv
from counterflow.schedule.search import search
from test_deepspeed import make_case, make_zero, run_cases
from tests.support.comparing import HALF_TOLERANCE, TOLERANCE, find_difference
from tests.support.forked_ranks import RanksError

STEPS = 20
FAMILIES = ("1f1b", "interleaved", "zb-h1", "zbv", "dualpipev", "dualpipe")
# By pipeline ranks: micro-batches of a step.
MICROBATCHES = {2: 4, 4: 8}
SEARCH_SECONDS = 2.0
MODELS = ("dense", "tuple", "tied")
BF16 = {"bf16": {"enabled": True}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16/fp32": BF16 | {"data_types": {"grad_accum_dtype": "fp32"}},
    "bf16": BF16,
}
CLIPPING, NUDGE = 0.5, 1e-6
TIMES_ROUNDING = 2.0


class Row(NamedTuple):
    """A run, the run that it is compared with, and in bf16 other runs that are as right as that one."""

    name: str
    reference: str
    rounded: tuple[str, ...] = ()


def search_table(ranks: int, folder: Path) -> str:
    """Return the path of a table that a search found."""
    table = search(ranks, MICROBATCHES[ranks], Costs(overlap=0.8), layout=lay_v(ranks), seconds=SEARCH_SECONDS).table
    path = folder / "searched.csv"
    path.write_text(to_csv(table), encoding="utf-8")
    return str(path)


def list_runs(model: str, ranks: int, seed: int, searched: str) -> tuple[dict[str, Any], list[Row]]:
    """Return the cases of one model, number of pipeline ranks and seed, and the comparisons."""
    cases: dict[str, Any] = {}
    rows = []

    def add(name: str, schedule: str | None, **changes: Any) -> str:
        stages = changes.pop("stages", ranks)
        case = make_case(model, schedule, seed, **{"gradient_accumulation_steps": MICROBATCHES[ranks], **changes})
        cases[name] = case | {"steps": STEPS, "stages": stages, "is_seeded": True}
        return name

    for precision, keys in PRECISIONS.items():
        plain = add(f"{precision} plain", None, **keys)
        nudged = (
            (add(f"{precision} nudged", None, gradient_clipping=CLIPPING * (1 + NUDGE), **keys), "fp32 plain") if keys else ()
        )
        for schedule in (*FAMILIES, searched):
            if schedule == "dualpipe" and ranks == 4:
                continue  # four ranks hold one replica, and the family joins two
            rows.append(Row(add(f"{precision} {Path(schedule).stem}", schedule, **keys), plain, nudged))
    # Without a pipeline a rank is a replica, and all four together run the micro-batches that the pipelines run.
    zero = make_zero(0)
    alone = add("fp32 one rank", None, stages=1, gradient_accumulation_steps=MICROBATCHES[ranks] // ranks, zero_optimization=zero)
    rows += [Row(row.name, alone) for row in rows if row.name.startswith("fp32")]
    return cases, rows


def judge(row: Row, done: dict[str, Any]) -> tuple[bool, str]:
    """Tell whether a run is as near to its reference as asked, and say how near it is."""
    run, reference = done[row.name], done[row.reference]
    # Without a pipeline, at ZeRO-0, DeepSpeed tells no norm.
    numbers = [name for name in ("loss", "grad_norm") if name in reference["steps"][0]]
    apart = find_difference(run, reference, *numbers)
    if not row.rounded:
        return apart <= TOLERANCE, f"{apart:.1e} apart, asked {TOLERANCE:.0e}"
    rounding = max(find_difference(reference, done[other], *numbers) for other in row.rounded)
    first = find_difference(cut_to_first(run), cut_to_first(reference), *numbers)
    said = f"{apart:.1e} apart (first step {first:.1e}), rounding {rounding:.1e}"
    most = HALF_TOLERANCE if row.name.startswith("bf16 ") else TOLERANCE
    return first <= most and apart <= TIMES_ROUNDING * rounding, said


def cut_to_first(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's first step alone."""
    return {**run, "steps": run["steps"][:1]}


def run_all(model: str, ranks: int, seed: int) -> Iterator[tuple[bool, str]]:
    """Train, and yield a verdict and a line for each comparison."""
    with tempfile.TemporaryDirectory() as folder:
        cases, rows = list_runs(model, ranks, seed, search_table(ranks, Path(folder)))
        try:
            done = run_cases(cases, Path(folder))
        except RanksError as error:
            yield False, str(error)
            return
    for row in rows:
        fits, said = judge(row, done)
        yield fits, f"{row.name:<22} {'' if row.reference.endswith('plain') else 'beside one rank ':<16} {said}"


def main() -> None:
    """Run the chosen part of the grid and print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=list(MICROBATCHES), choices=list(MICROBATCHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 4321])
    options = parser.parse_args()
    is_good = True
    for seed in options.seeds:
        for model in options.models:
            for ranks in options.ranks:
                for fits, said in run_all(model, ranks, seed):
                    is_good &= fits
                    print(f"{seed} {model:<6} PP {ranks}  {'agrees ' if fits else 'DIFFERS'} {said}", flush=True)
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
