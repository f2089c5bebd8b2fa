"""The cases of just-in-time clones: other ones in every micro-batch, and plain Megatron's runs beside them."""

from pathlib import Path

from eplb_cases import FOUR_RANKS, FULL_RECOMPUTE, SELECTIVE_RECOMPUTE, TWO_REPLICAS
from tests.support.run_cases import Case
from tests.support.training import DUALPIPE, OVERLAPPED, SCHEDULES, SHARDED, TWO_STAGES, Cases, list_base_flags

STEPS = 20
SEEDS = (1234, 4321)
SHARED_BUFFERS = ["--cf-eplb", "--cf-eplb-clones-per-rank", "2", "--cf-eplb-buffers", "shared"]
PAIRS = ["--cf-overlap"]
EXACT = {count: ["--cf-eplb", "--cf-eplb-clones-per-rank", str(count), "--cf-eplb-plan", "exact"] for count in (1, 2)}
AUTO = {count: ["--cf-eplb", "--cf-eplb-clones-per-rank", str(count), "--cf-eplb-plan", "auto"] for count in (1, 2)}

# Beside plain Megatron's run of the plain or the sharded optimizer.
PLAIN = {
    "1f1b": [TWO_STAGES, EXACT[1], SCHEDULES["1f1b"]],
    "dualpipev": [TWO_STAGES, EXACT[1], SCHEDULES["dualpipev"]],
    "zb-h1": [TWO_STAGES, EXACT[2], ["--cf-schedule", "zb-h1"]],
    "zbv, auto": [TWO_STAGES, AUTO[1], ["--cf-schedule", "zbv"]],
    "interleaved": [TWO_STAGES, EXACT[2], SCHEDULES["interleaved"]],
    "full recompute": [TWO_STAGES, EXACT[1], FULL_RECOMPUTE],
    "selective recompute, dualpipev, pairs": [TWO_STAGES, EXACT[1], SELECTIVE_RECOMPUTE, SCHEDULES["dualpipev"], PAIRS],
    "no pipeline": [FOUR_RANKS, EXACT[1]],
    "predicted, shared buffers": [TWO_STAGES, SHARED_BUFFERS, SCHEDULES["1f1b"]],
    "auto, shared buffers": [FOUR_RANKS, AUTO[1], ["--cf-eplb-buffers", "shared"]],
    "two replicas, auto": [TWO_REPLICAS, AUTO[1]],
}
SHARDED_RUNS = {
    "dualpipe": [TWO_STAGES, EXACT[1], OVERLAPPED, DUALPIPE],
    "dualpipe, pairs": [TWO_STAGES, EXACT[2], SHARDED, DUALPIPE, PAIRS],
    "dualpipev, auto, pairs": [TWO_STAGES, AUTO[1], OVERLAPPED, SCHEDULES["dualpipev"], PAIRS],
    "four ranks, two clones": [FOUR_RANKS, EXACT[2], OVERLAPPED],
    "two replicas": [TWO_REPLICAS, EXACT[1], OVERLAPPED],
    "auto, homes move": [TWO_STAGES, AUTO[1], ["--cf-eplb-rehome-interval", "1"], SHARDED],
}


def list_cases(text: Path, directory: Path, seed: int = SEEDS[0]) -> list[Case]:
    """Return the cases in an order in which each finds the checkpoint it starts from."""
    cases = Cases(directory, [*list_base_flags(text, directory), "--seed", str(seed)], STEPS)
    cases.add("initial", TWO_STAGES, plugin=False, steps=1, save=1)
    weights = cases.start_from("initial")
    cases.add("megatron, plain", TWO_STAGES, weights, plugin=False)
    cases.add("megatron, sharded", TWO_STAGES, weights, SHARDED, plugin=False)
    for name, flags in (PLAIN | SHARDED_RUNS).items():
        cases.add(name, weights, *flags)
    cases.add("planned", TWO_STAGES, weights, EXACT[1], SCHEDULES["1f1b"], plans="made")
    cases.add("planned, four ranks", FOUR_RANKS, weights, EXACT[1], plans="made")
    return [{**case, "seed": seed + place} for place, case in enumerate(cases)]
