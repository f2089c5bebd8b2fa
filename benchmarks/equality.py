"""Does every schedule train like Megatron? ``python -m benchmarks.equality [--seeds 1234 4321]``.

Ten steps of the example's MoE model, made small, on four CPU ranks: plain Megatron 1F1B, then every family and twenty
searched tables (layouts, micro-batch costs and memory caps of their own) from the same weights. Prints by how much losses and
gradient norms differ at most.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.works_with import INITIAL, REFERENCE
from counterflow.schedule import FAMILIES, Costs, Layout, lay_looped, lay_straight, lay_v, to_csv
from counterflow.schedule.search import search
from data import prepare_text
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.run_cases import Case, Runs
from tests.support.training import CHUNKS, SHARDED, TWO_STAGES, Cases, list_base_flags

STEPS, MICROBATCHES = 10, 6


def write_searched_tables(directory: Path, count: int) -> dict[str, list[str]]:
    """Search ``count`` tables that differ; return the flags of each by its name."""
    rng = random.Random(0)
    found: dict[str, list[str]] = {}
    layouts: list[Layout] = [lay_v(2), lay_looped(2, 2), lay_v(2), lay_straight(2)]
    digests: set[int] = set()
    while len(found) < count:
        layout = layouts[len(found) % len(layouts)]
        stages = layout.last_stage + 1
        f, i, w = ([rng.uniform(1, 4) for _ in range(stages)] for _ in range(3))
        costs = Costs(f=f, i=i, w=w, overlap=rng.choice((1.0, 0.8)))
        cap = rng.choice((2.0, 2.5, 3.0, 6.0))
        table = search(
            2, MICROBATCHES, costs, max_chunks=layout.chunks, max_activations=cap, seconds=0.5, seed=len(found), layout=layout
        ).table
        if table.digest in digests:
            continue
        digests.add(table.digest)
        name = f"searched {len(found)}: {layout.name}, cap {cap:g}"
        path = directory / f"searched-{len(found)}.csv"
        path.write_text(to_csv(table))
        found[name] = ["--cf-schedule", str(path), *(CHUNKS if layout.name == "looped" else [])]
    return found


def list_cases(directory: Path, seed: int, tables: int) -> list[Case]:
    """Return the cases: initial weights, the reference, then what is compared with it."""
    text = prepare_text(directory / "text", max_bytes=2**21)
    cases = Cases(directory, [*list_base_flags(text, directory), *SHARDED, *TWO_STAGES, "--seed", str(seed)], STEPS)
    cases.add(INITIAL, plugin=False, steps=1, save=1)
    start = cases.start_from(INITIAL)
    cases.add(REFERENCE, start, plugin=False)
    chosen = {name: ["--cf-schedule", name, *(CHUNKS if name == "interleaved" else [])] for name in (*FAMILIES, "auto")}
    for name, flags in (chosen | write_searched_tables(directory, tables)).items():
        cases.add(name, start, flags)
    return cases


def main() -> None:
    """Run, print a line per schedule, end with status 1 where one differs."""
    parser = argparse.ArgumentParser(description="Compare every schedule's losses and gradient norms with plain Megatron's.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234], help="a run of everything per seed (default: 1234)")
    parser.add_argument("--tables", type=int, default=20, metavar="N", help="searched tables (default: 20)")
    given = parser.parse_args()
    worst = 0.0
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs = Runs("worker", list_cases(Path(folder), seed, given.tables), Path(folder))
            for name in [name for name in runs if name not in (INITIAL, REFERENCE)]:
                difference = find_difference(runs[name], runs[REFERENCE])
                worst = max(worst, difference)
                print(f"seed {seed}  {name:34} {len(runs[name]['steps'])} steps, differs by {difference:.1e} at most", flush=True)
    print(f"largest difference {worst:.1e}, allowed {TOLERANCE:g}: {'PASS' if worst <= TOLERANCE else 'NOT REACHED'}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
