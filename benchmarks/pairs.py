"""Overlapped pairs beside the same training without: `python -m benchmarks.pairs [--models GPTModel] [--seeds 1234]`.

Trains 20 steps on four CPU ranks, in fp32 and in bf16, with ``--cf-overlap`` and without, from one checkpoint for each model and
seed. Says by how much losses and gradient norms differ, and ends with status 1 where they do: by more than 1e-5 in fp32, by a bit
in bf16.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cases import WHOLE
from data import prepare_text
from hybrid_cases import AUXILIARY, GPT_ALONE, MADE_OF_LAYERS, PATTERN, SCRIPT
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.forked_ranks import RanksError
from tests.support.run_cases import Runs
from tests.support.training import CHUNKS, SHARDED, TENSOR_PARALLEL, TWO_STAGES, drop_flags, list_base_flags, start_from

STEPS = 20
PAIRED = "overlapped pairs"
SCHEDULES = {
    "dualpipev": ["--cf-schedule", "dualpipev"],
    "dualpipe": ["--cf-schedule", "dualpipe"],
    "interleaved": ["--cf-schedule", "interleaved"],
}
PRECISIONS: dict[str, list[str]] = {"fp32": [], "bf16": ["--bf16"]}
# By model, what is trained: flags of the model, and of what a run adds to it.
VARIANTS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "GPTModel": {
        "plain": (TWO_STAGES, []),
        "auxiliary losses": (TWO_STAGES, AUXILIARY),
        "full recompute, shared experts in overlap": (TWO_STAGES, [*WHOLE, "--moe-shared-expert-overlap"]),
        "allgather": (TWO_STAGES, ["--moe-token-dispatcher-type", "allgather"]),
        "MTP 2": ([*TWO_STAGES, "--mtp-num-layers", "2"], []),
        "TP 2": (TENSOR_PARALLEL, []),
        "clones": (TWO_STAGES, ["--cf-eplb", "--cf-eplb-clones-per-rank", "1"]),
    },
    "HybridModel": {
        "plain": ([*TWO_STAGES, PATTERN, "*-|*E|*E*|E"], []),
        "auxiliary losses": ([*TWO_STAGES, PATTERN, "*-|*E|*E*|E"], AUXILIARY),
        "full recompute": ([*TWO_STAGES, PATTERN, "*-|*E|*E*|E"], WHOLE),
        "MTP 2": ([*TWO_STAGES, PATTERN, "*-|*E|*E*|E/*E/*E"], []),
        "clones": ([*TWO_STAGES, PATTERN, "*-|*E|*E*|E"], ["--cf-eplb", "--cf-eplb-clones-per-rank", "1"]),
    },
}


def list_cases(model: str, variant: str, seed: str, text: Path, directory: Path) -> list[dict[str, Any]]:
    """Return the runs of one model and seed: first weights, then each schedule without pairs and with them."""
    layout, chosen = VARIANTS[model][variant]
    base = [*list_base_flags(text, directory), *layout, "--seed", seed]
    script = {} if model == "GPTModel" else {"script": SCRIPT}
    base = base if model == "GPTModel" else drop_flags([*base, *MADE_OF_LAYERS], *GPT_ALONE)
    first = [*base, *SCHEDULES["dualpipev"], "--train-iters", "1", "--save", str(directory), "--save-interval", "1"]
    cases: list[dict[str, Any]] = [{"name": "first weights", "plugin": True, "flags": first, **script}]
    steps = [*start_from(directory), "--train-iters", str(STEPS)]
    for precision, half in PRECISIONS.items():
        for schedule, flags in SCHEDULES.items() if variant == "plain" else [("dualpipev", SCHEDULES["dualpipev"])]:
            flags = [*flags, *(CHUNKS if schedule == "interleaved" and model == "GPTModel" else []), *SHARDED]
            name, whole = f"{schedule}, {precision}", [*base, *half, *chosen, *steps, *flags]
            cases.append({"name": name, "plugin": True, "flags": whole, **script})
            cases.append({"name": f"{name}, {PAIRED}", "plugin": True, "flags": [*whole, "--cf-overlap"], **script})
    return cases


def compare(runs: Runs, name: str, tolerance: float) -> tuple[bool, str]:
    """Tell whether a run's steps are those without pairs, and say by how much they differ."""
    try:
        run, reference = runs[f"{name}, {PAIRED}"], runs[name]
    except RanksError as error:
        return False, str(error)
    worst = find_difference(run, reference, "loss", "grad_norm", "mtp_loss")
    seconds = f"{run['seconds']:5.1f} s beside {reference['seconds']:5.1f} s"
    return worst <= tolerance, f"{seconds}, {len(run['steps'])} steps  {f'{worst:.1e}' if worst else 'bit-equal'}"


def main() -> None:
    """Run the chosen part of the matrix and print a line for each pair of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--variants", nargs="+", help="such as 'MTP 2'")
    parser.add_argument("--seeds", nargs="+", default=["1234", "4321"])
    options = parser.parse_args()
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(Path(folder) / "text", max_bytes=2**21)
        for model in options.models:
            for variant in options.variants or VARIANTS[model]:
                for seed in options.seeds if variant in VARIANTS[model] else []:
                    directory = Path(folder) / f"{model}, {variant}, {seed}"
                    directory.mkdir()
                    cases = list_cases(model, variant, seed, text, directory)
                    runs = Runs("eplb_worker", cases, directory)
                    for name in [case["name"] for case in cases[1:] if PAIRED not in case["name"]]:
                        agrees, said = compare(runs, name, 0.0 if "bf16" in name else TOLERANCE)
                        is_good &= agrees
                        print(
                            f"{model:<11} {variant:<41} {seed} {name:<17} {'agrees ' if agrees else 'DIFFERS'} {said}", flush=True
                        )
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
