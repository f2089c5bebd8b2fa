"""The balancing cases: clones drawn anew for every step, with what a training may have, and plain Megatron's runs beside them."""

from pathlib import Path
from typing import Any

from tests.support.run_cases import Case
from tests.support.training import (
    DUALPIPE,
    MTP,
    OVERLAPPED,
    SCHEDULES,
    SHARDED,
    TENSOR_PARALLEL,
    TWO_STAGES,
    UNALIGNED,
    Cases,
    list_base_flags,
)

STEPS = 6
SAVED = 3
# Homes move by themselves at the earliest in the step after four; that one is saved.
SETTLED, SETTLED_STEPS = 5, 8
SEEDS = ("1234", "4321")

CLONES = {count: ["--cf-eplb", "--cf-eplb-clones-per-rank", str(count)] for count in range(4)}
ON = CLONES[1]
MOVING = ["--cf-eplb-rehome-interval", "1"]
EVEN = ["--cf-eplb-split", "even"]
# Two replicas of an expert-parallel group of two, and one of four.
TWO_REPLICAS = ["--expert-model-parallel-size", "2"]
FOUR_RANKS = ["--expert-model-parallel-size", "4"]
EIGHT_EXPERTS = ["--num-experts", "8"]
# So many tokens that it pays to move an expert.
LARGE = ["--micro-batch-size", "4", "--global-batch-size", "64"]
# The all-to-all dispatcher gathers uneven parts over expert tensor parallel ranks, which gloo cannot.
SPLIT_EXPERTS = """
    --tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 2
    --moe-token-dispatcher-type allgather
""".split()
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
SELECTIVE_RECOMPUTE = "--recompute-granularity selective --recompute-modules core_attn moe".split()
FP16 = "--fp16 --initial-loss-scale 65536 --loss-scale-window 2".split()

# All are compared with plain Megatron's one run of the plain or the sharded optimizer.
PLAIN = {
    "plain": [TWO_STAGES, ON],
    "interleaved, two clones": [TWO_STAGES, CLONES[2], SCHEDULES["interleaved"]],
    "two replicas, per-token loss": [TWO_REPLICAS, CLONES[2], ["--calculate-per-token-loss"]],
    "1f1b, even split": [TWO_STAGES, CLONES[2], EVEN, SCHEDULES["1f1b"]],
    "selective recompute": [TWO_STAGES, CLONES[2], SELECTIVE_RECOMPUTE],
    "full recompute, even split": [TWO_STAGES, CLONES[2], EVEN, FULL_RECOMPUTE],
    "TP 2": [TENSOR_PARALLEL, TWO_REPLICAS, ["--expert-tensor-parallel-size", "1"], CLONES[2], SCHEDULES["dualpipev"]],
    "TP 2, expert TP 2, allgather": [TWO_REPLICAS, CLONES[2], SPLIT_EXPERTS],
}
SHARDED_RUNS = {
    "sharded": [TWO_STAGES, CLONES[2], SHARDED],
    "dualpipev": [TWO_STAGES, ON, SHARDED, SCHEDULES["dualpipev"]],
    "dualpipev, overlap": [TWO_STAGES, CLONES[2], OVERLAPPED, SCHEDULES["dualpipev"]],
    "zbv, overlap, not aligned": [TWO_STAGES, ON, UNALIGNED, ["--cf-schedule", "zbv"]],
    "dualpipe": [TWO_STAGES, CLONES[2], OVERLAPPED, DUALPIPE],
    "two replicas, overlap": [TWO_REPLICAS, ON, OVERLAPPED],
    "four ranks, overlap, not aligned": [FOUR_RANKS, CLONES[3], UNALIGNED],
    "homes move, two replicas, overlap": [TWO_REPLICAS, ON, MOVING, OVERLAPPED],
    "homes move, dualpipev": [TWO_STAGES, ON, MOVING, SHARDED, SCHEDULES["dualpipev"]],
}
# What resumes from whose checkpoint, with or without clones.
RESUMED = {
    "megatron, plain": ("dualpipev, plain", [SCHEDULES["dualpipev"], ON]),
    "megatron, sharded": ("native, sharded", [SHARDED, CLONES[2]]),
    "plain": ("megatron, plain", []),
    "sharded": ("megatron, sharded", [SHARDED]),
    "homes move, dualpipev": ("megatron, sharded", [SHARDED]),
}


def list_cases(text: Path, directory: Path) -> list[Case]:
    """Return the cases in an order in which each finds the checkpoint it starts from."""
    cases = Cases(directory, list_base_flags(text, directory), STEPS)
    cases.add("initial", TWO_STAGES, plugin=False, steps=1, save=1)
    weights = cases.start_from("initial")
    start = [*TWO_STAGES, *weights]
    cases.add("megatron, plain", start, plugin=False, save=SAVED)
    cases.add("megatron, sharded", start, SHARDED, plugin=False, save=SAVED)
    for name, flags in (PLAIN | SHARDED_RUNS).items():
        cases.add(name, weights, *flags, save=SAVED if name in RESUMED else STEPS)
    for saved, (loaded, flags) in RESUMED.items():
        resumed = cases.resume_from(saved, SAVED)
        cases.add(f"{saved} -> {loaded}", TWO_STAGES, resumed, *flags, plugin=not loaded.startswith("megatron"))
    beside = ["--cf-eplb-interval", "2", "--moe-shared-expert-overlap"]
    cases.add("planned, every second step", start, ON, beside, plans="made")
    cases.add("homes move, no clones", start, CLONES[0], MOVING)
    # Megatron wraps no data parallelism around a model that it only evaluates.
    cases.add("megatron, evaluated alone", start, ["--skip-train"], plugin=False)
    cases.add("evaluated alone", start, ["--skip-train"], ON, SCHEDULES["dualpipev"])

    for kind, numbers in {"bf16": ["--bf16"], "fp16": FP16}.items():
        cases.add(f"megatron, {kind}", start, numbers, plugin=False)
        cases.add(kind, start, numbers, CLONES[2])
    cases.add("bf16, homes move", start, ["--bf16"], ON, MOVING)
    cases.add("bf16, overlapped pairs", start, ["--bf16", "--cf-overlap"], OVERLAPPED, CLONES[2], SCHEDULES["dualpipev"])
    # From their own random weights: clones are to draw no random number. The first stage has no experts.
    dense_first = ["--moe-layer-freq", "([0]*2+[1]*2)"]
    cases.add("megatron, MTP", TWO_STAGES, MTP, dense_first, plugin=False)
    cases.add("MTP", TWO_STAGES, MTP, dense_first, ON)
    _add_settling(cases)
    # Each draws placements of its own.
    return [{**case, "seed": seed} for seed, case in enumerate(cases)]


def _add_settling(cases: Cases) -> None:
    """Add runs in which the experts of two of four ranks get no tokens, and homes move by themselves."""
    for seed in SEEDS:
        flags = [*FOUR_RANKS, *EIGHT_EXPERTS, *LARGE, *SHARDED, "--seed", seed]
        how: dict[str, Any] = {"steps": SETTLED_STEPS, "shunned": [0, 1, 2, 3], "plans": "made"}
        cases.add(f"megatron, two ranks shunned, {seed}", flags, plugin=False, **how)
        cases.add(f"two ranks shunned, {seed}", flags, CLONES[0], save=SETTLED, **how)
    resumed = [
        *EIGHT_EXPERTS,
        *LARGE,
        *SHARDED,
        "--seed",
        SEEDS[-1],
        *cases.resume_from(f"two ranks shunned, {SEEDS[-1]}", SETTLED),
    ]
    cases.add("two ranks shunned -> homes alone", FOUR_RANKS, resumed, CLONES[0], **how)
    cases.add("two ranks shunned -> other EP and clones", TWO_REPLICAS, resumed, CLONES[2], **how)
    cases.add("two ranks shunned -> megatron", FOUR_RANKS, resumed, plugin=False, **how)
