"""What each schedule works with: `python -m benchmarks.works_with [--only WORD] [--schedules dualpipev]`.

Trains a small model for a few steps on four CPU ranks under plain Megatron 1F1B and under each schedule, from one
checkpoint, with each combination of flags in turn, and says by how much losses and gradient norms differ.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import prepare_text
from tests.support.comparing import TOLERANCE, find_difference
from tests.support.forked_ranks import RanksError
from tests.support.run_cases import Case, Run, Runs
from tests.support.training import TWO_STAGES, UNTIE, Cases, drop_flags, list_base_flags

STEPS = 3
REFERENCE = "megatron 1f1b"
INITIAL = "initial weights"


@dataclass(frozen=True)
class Variant:
    """Flags that change how a model trains and leave its numbers as they are.

    ``layouts`` replaces the chunks that a schedule is given by default.
    """

    name: str
    add: str = ""
    layouts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Flags that change the numbers, so that plain Megatron 1F1B runs with them too; a flag in ``drop`` goes with its values."""

    name: str
    add: str = ""
    drop: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = (Variant("as it is"),)


SHARDED = "--use-distributed-optimizer"
OVERLAPPED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
BATCH = "--global-batch-size"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 1"
LAYOUT = "--pipeline-model-parallel-layout"

EXPERTS = (
    "--num-experts", "--moe-layer-freq", "--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size", "--moe-router-topk",
    "--moe-router-num-groups", "--moe-router-group-topk", "--moe-router-score-function", "--moe-router-topk-scaling-factor",
    "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "--moe-router-load-balancing-type",
    "--moe-router-dtype", "--moe-token-dispatcher-type", "--expert-model-parallel-size",
)  # fmt: skip
OPTIMIZERS = (
    Variant("as it is"),
    Variant("sharded", SHARDED),
    Variant("overlap", OVERLAPPED),
)
MODELS = (
    Model(
        "moe",
        variants=(
            *OPTIMIZERS,
            Variant("EP 1", "--expert-model-parallel-size 1"),
            Variant("allgather", "--moe-token-dispatcher-type allgather"),
            Variant("per-token loss", "--calculate-per-token-loss"),
            *(Variant(f"recompute {module}", f"{SELECTIVE} {module}") for module in
              ("core_attn", "moe", "mlp", "layernorm", "moe_act", "shared_experts")),
            Variant("recompute uniform", f"{FULL} uniform"),
            Variant("recompute block", f"{FULL} block"),
            Variant("shared-expert overlap", "--moe-shared-expert-overlap"),
            Variant("shared-expert overlap, recompute uniform", f"--moe-shared-expert-overlap {FULL} uniform"),
            Variant("allgather, recompute uniform", f"--moe-token-dispatcher-type allgather {FULL} uniform"),
            Variant("layout", layouts={"straight": f"{LAYOUT} Ettt|tL", "two chunks": f"{LAYOUT} Et|t|tt|L"}),
        ),
    ),
    Model("bf16", "--bf16", variants=OPTIMIZERS),
    Model("tied", drop=(UNTIE,), variants=(*OPTIMIZERS, Variant("per-token loss", "--calculate-per-token-loss"))),
    Model("tied, bf16", "--bf16", drop=(UNTIE,), variants=OPTIMIZERS),
    Model("MTP", "--mtp-num-layers 1", variants=(*OPTIMIZERS,
        Variant("per-token loss", "--calculate-per-token-loss"),
        Variant("layout", layouts={"straight": f"{LAYOUT} Ettt|tmL", "two chunks": f"{LAYOUT} Et|t|tt|mL"}))),
    Model("MTP 2", "--mtp-num-layers 2", variants=(Variant("as it is"), Variant("recompute uniform", f"{FULL} uniform"))),
    # Expert tensor parallelism is 2 too where no flag sets it.
    Model("TP 2", TP2, variants=(*OPTIMIZERS,
        Variant("ETP 1, EP 2", "--expert-tensor-parallel-size 1 --expert-model-parallel-size 2"),
        Variant("recompute uniform", f"{FULL} uniform"))),
    Model("TP 2, tied", TP2, drop=(UNTIE,), variants=OPTIMIZERS),
    Model("dense, TP 2", "--tensor-model-parallel-size 2", drop=EXPERTS),
    Model("CP 2", "--context-parallel-size 2"),
    Model("6 layers", "--num-layers 6 --moe-layer-freq ([0]*1+[1]*5)", variants=(
        Variant("first rank 2", "--decoder-first-pipeline-num-layers 2", layouts={"straight": "", "two chunks": f"{CHUNKS} 2"}),
        Variant("last rank 2", "--decoder-last-pipeline-num-layers 2", layouts={"straight": "", "two chunks": f"{CHUNKS} 2"}))),
    Model("aux loss", "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3",
        drop=("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate"), variants=OPTIMIZERS),
    # From 4 micro-batches to 6 after two steps of 8 samples; thresholds are tokens.
    Model("growing batches", "--step-batch-size-schedule 0:8,512:12", drop=(BATCH,), variants=OPTIMIZERS),
    Model("skipped iterations", "--iterations-to-skip 2 5", variants=OPTIMIZERS),
    Model("dense, learned positions, tied", "--position-embedding-type learned_absolute",
        drop=("--position-embedding-type", "--normalization", "--swiglu", "--disable-bias-linear", UNTIE, *EXPERTS)),
)  # fmt: skip
# By layout: straight, looped, V.
FAMILIES = {"1f1b": "", "zb-h1": "", "interleaved": f"{CHUNKS} 2", "dualpipev": "", "zbv": ""}
PAIRED = ", overlapped pairs"
FAMILIES |= {f"{name}{PAIRED}": FAMILIES[name] for name in ("interleaved", "dualpipev")}


def list_layout(variant: Variant, schedule: str) -> list[str]:
    """Return the flags of a schedule and of its chunks; plain Megatron takes none."""
    if schedule == REFERENCE:
        return []
    straight = schedule in ("1f1b", "zb-h1")
    layout = variant.layouts.get("straight" if straight else "two chunks", FAMILIES[schedule])
    pairs = ["--cf-overlap"] if schedule.endswith(PAIRED) else []
    return ["--cf-schedule", schedule.removesuffix(PAIRED), *layout.split(), *pairs]


def list_cases(model: Model, variants: list[Variant], schedules: list[str], text: Path, directory: Path) -> list[Case]:
    """Return the runs of one model: the weights that all start from, the reference, each variant under each schedule."""
    base = drop_flags([*list_base_flags(text, directory), *TWO_STAGES, BATCH, "8"], *model.drop)
    cases = Cases(directory, [*base, *model.add.split()], STEPS)
    cases.add(INITIAL, plugin=False, steps=1, save=1)
    start = cases.start_from(INITIAL)
    cases.add(REFERENCE, start, plugin=False)
    for variant in variants:
        for schedule in schedules:
            flags = [*variant.add.split(), *list_layout(variant, schedule)]
            cases.add(f"{variant.name:<20} {schedule}", flags, start, plugin=schedule != REFERENCE, may_fail=True)
    return cases


def run_cases(cases: list[Case], directory: Path) -> Iterator[Run]:
    """Run the cases in turn; where the first weights or the reference fail, there is nothing to compare the others with."""
    runs = Runs("worker", cases, directory)
    for name in runs:
        try:
            yield runs[name]
        except RanksError as error:
            yield {"name": name, "steps": [], "evaluations": [], "error": str(error)}
            if name in (INITIAL, REFERENCE):
                return


def compare(run: Run, reference: Run) -> str:
    """Say how far a run's losses and gradient norms are from the reference's."""
    if run["error"] is not None:
        return str(run["error"]).splitlines()[0]
    worst = find_difference(run, reference, "loss", "grad_norm", "mtp_loss")
    return f"{'agrees' if worst <= TOLERANCE else 'DIFFERS'} ({worst:.1e})"


def main() -> None:
    """Run the chosen part of the matrix and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    parser.add_argument("--variants", nargs="+", help="the names of some variants (default: all)")
    parser.add_argument(
        "--schedules", nargs="+", default=list(FAMILIES), help=f"{', '.join(FAMILIES)} or {REFERENCE!r} for Megatron itself"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = prepare_text(Path(folder) / "text", max_bytes=2**21)
        for model in MODELS:
            variants = [one for one in model.variants if not options.variants or one.name in options.variants]
            if model.name not in options.models or not variants:
                continue
            directory = Path(folder) / model.name.replace(" ", "-")
            directory.mkdir()
            reference: Run = {}
            for run in run_cases(list_cases(model, variants, options.schedules, text, directory), directory):
                if run["name"] == REFERENCE:
                    reference = run
                elif run["name"] != INITIAL or run["error"] is not None:
                    print(
                        f"{model.name:<12} {run['name']:<34} {run.get('seconds', 0):5.1f} s  {compare(run, reference)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
