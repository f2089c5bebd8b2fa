"""Whether versions of Megatron train alike: `python -m benchmarks.versions TREE… [--only WORD] [--seeds 1234 4321]`.

A tree is a checkout of Megatron-LM. Its own ``pretrain_gpt.py`` trains a small model of experts for a few steps on four CPU
ranks, under plain Megatron 1F1B and under the plugin, from one checkpoint; the table says by how much losses and gradient
norms differ. A tree compiles its data set helper once.
"""

import argparse
import os
import runpy
import tempfile
from pathlib import Path

from benchmarks.works_with import CHUNKS, INITIAL, REFERENCE, SHARDED, compare, run_cases
from tests.support import ROOT
from tests.support.run_cases import Case, Run
from tests.support.training import TWO_STAGES, Cases, list_base_flags

BF16 = "megatron 1f1b, bf16"
VPP = f"--cf-schedule interleaved {CHUNKS} 2"
CLONES = "--cf-eplb --cf-eplb-clones-per-rank 2"
# What the plugin runs, and plain Megatron's run that it is to agree with.
RUNS = {
    REFERENCE: {
        "no flag": "",
        "1f1b": "--cf-schedule 1f1b",
        "interleaved": VPP,
        "dualpipev": "--cf-schedule dualpipev",
        "zbv": "--cf-schedule zbv",
        "dualpipe": "--cf-schedule dualpipe",
        "dualpipev, sharded": f"--cf-schedule dualpipev {SHARDED} --overlap-grad-reduce --overlap-param-gather",
        "clones alone": CLONES,
        "dualpipev, clones": f"--cf-schedule dualpipev {CLONES}",
    },
    BF16: {
        "dualpipev, bf16": "--cf-schedule dualpipev --bf16",
        "interleaved, overlapped pairs": f"{VPP} --cf-overlap --bf16",
        "dualpipev, overlapped pairs": "--cf-schedule dualpipev --cf-overlap --bf16",
        "dualpipe, overlapped pairs": "--cf-schedule dualpipe --cf-overlap --bf16",
    },
}
STEPS = 3


def list_cases(tree: Path, seed: int, only: str, directory: Path) -> list[Case]:
    """Return the runs: the weights that all start from, plain Megatron's, the plugin's."""
    base = [*list_base_flags(None, directory), *TWO_STAGES, "--global-batch-size", "8", "--seed", str(seed)]
    cases = Cases(directory, base, STEPS)
    cases.add(INITIAL, plugin=False, steps=1, save=1)
    start = cases.start_from(INITIAL)
    for reference, runs in RUNS.items():
        chosen = {name: flags for name, flags in runs.items() if only in name}
        if chosen:
            cases.add(reference, start, ["--bf16"] if reference == BF16 else [], plugin=False)
        for name, flags in chosen.items():
            cases.add(name, start, flags.split())
    return [{**case, "script": str(tree / "pretrain_gpt.py"), "may_fail": True} for case in cases]


def find_version(tree: Path) -> str:
    """Return the version that a tree says it is."""
    return str(runpy.run_path(str(tree / "megatron" / "core" / "package_info.py"))["__version__"])


def main() -> None:
    """Train with each tree and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, metavar="TREE")
    parser.add_argument("--only", default="", metavar="WORD", help="the runs whose names have it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234], metavar="SEED")
    options = parser.parse_args()
    own_path = os.environ.get("PYTHONPATH", str(ROOT / "plugin"))
    for tree in map(Path.resolve, options.trees):
        version = find_version(tree)
        os.environ["PYTHONPATH"] = f"{tree}{os.pathsep}{own_path}"
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                logged: dict[str, Run] = {}
                for run in run_cases(list_cases(tree, seed, options.only, Path(folder)), Path(folder)):
                    logged[run["name"]] = run
                    reference = next((name for name, runs in RUNS.items() if run["name"] in runs), None)
                    said = compare(run, logged[reference]) if reference in logged else (run["error"] or "")
                    print(f"{version:<8} {seed:<6} {run['name']:<32} {run.get('seconds', 0):5.1f} s  {said}", flush=True)


if __name__ == "__main__":
    main()
