"""The cases of just-in-time clones: other ones in every micro-batch, and plain Megatron's runs beside them."""

from pathlib import Path

from eplb_cases import FOUR_RANKS, FULL_RECOMPUTE, SELECTIVE_RECOMPUTE, SPLIT_EXPERTS, TWO_REPLICAS
from tests.support.run_cases import Case
from tests.support.training import (
    DUALPIPE,
    MTP,
    OVERLAPPED,
    SCHEDULES,
    SHARDED,
    TENSOR_PARALLEL,
    TWO_STAGES,
    Cases,
    list_base_flags,
)

SEEDS = (1234, 4321)
# Steps from measurement to measurement.
MEASURED = 3
PAIRS = ["--cf-overlap"]
MOVING = ["--cf-eplb-rehome-interval", "1"]


def lend(plan: str, count: int = 1, *more: str) -> list[str]:
    """Return the flags of a plan with ``count`` clones a rank of each kind."""
    return ["--cf-eplb", "--cf-eplb-plan", plan, "--cf-eplb-clones-per-rank", str(count), *more]


SHARED = ("--cf-eplb-buffers", "shared")
# What `make test` runs, beside plain Megatron's run of the plain or the sharded optimizer.
PLAIN = {
    "interleaved, two clones": [TWO_STAGES, lend("exact", 2), SCHEDULES["interleaved"]],
    "zbv, auto": [TWO_STAGES, lend("auto"), ["--cf-schedule", "zbv"]],
    "1f1b, full recompute": [TWO_STAGES, lend("exact"), FULL_RECOMPUTE, SCHEDULES["1f1b"]],
    "two replicas, auto, shared buffers": [TWO_REPLICAS, lend("auto", 1, *SHARED)],
}
SHARDED_RUNS = {
    "dualpipe": [TWO_STAGES, lend("exact"), OVERLAPPED, DUALPIPE],
    "dualpipev, pairs, selective recompute": [
        TWO_STAGES, lend("exact"), SHARDED, SELECTIVE_RECOMPUTE, SCHEDULES["dualpipev"], PAIRS
    ],
    "four ranks, two clones": [FOUR_RANKS, lend("exact", 2), OVERLAPPED],
}  # fmt: skip
# With these, what the nightly runs train.
MORE_PLAIN = {
    "1f1b": [TWO_STAGES, lend("exact"), SCHEDULES["1f1b"]],
    "1f1b, two clones": [TWO_STAGES, lend("exact", 2), SCHEDULES["1f1b"]],
    "interleaved": [TWO_STAGES, lend("exact"), SCHEDULES["interleaved"]],
    "zb-h1": [TWO_STAGES, lend("exact", 2), ["--cf-schedule", "zb-h1"]],
    "dualpipev": [TWO_STAGES, lend("exact"), SCHEDULES["dualpipev"]],
    "dualpipev, two clones, pairs": [TWO_STAGES, lend("exact", 2), SCHEDULES["dualpipev"], PAIRS],
    "predicted, shared buffers": [TWO_STAGES, lend("predicted", 2, *SHARED), SCHEDULES["1f1b"]],
    "four ranks": [FOUR_RANKS, lend("exact")],
    "four ranks, auto, shared buffers": [FOUR_RANKS, lend("auto", 1, *SHARED)],
    "TP 2": [TENSOR_PARALLEL, TWO_REPLICAS, ["--expert-tensor-parallel-size", "1"], lend("exact"), SCHEDULES["dualpipev"]],
    "TP 2, expert TP 2, allgather": [TWO_REPLICAS, lend("exact"), SPLIT_EXPERTS],
    "two replicas": [TWO_REPLICAS, lend("exact")],
    "two replicas, two clones": [TWO_REPLICAS, lend("exact", 2)],
}
MORE_SHARDED = {
    "1f1b, sharded": [TWO_STAGES, lend("exact"), SHARDED, SCHEDULES["1f1b"]],
    "interleaved, sharded": [TWO_STAGES, lend("exact", 2), OVERLAPPED, SCHEDULES["interleaved"]],
    "dualpipev, auto, pairs": [TWO_STAGES, lend("auto"), OVERLAPPED, SCHEDULES["dualpipev"], PAIRS],
    "dualpipe, two clones, pairs": [TWO_STAGES, lend("exact", 2), SHARDED, DUALPIPE, PAIRS],
    "four ranks, sharded": [FOUR_RANKS, lend("exact"), SHARDED],
    "two replicas, sharded": [TWO_REPLICAS, lend("exact"), OVERLAPPED],
    "auto, homes move": [TWO_STAGES, lend("auto"), MOVING, SHARDED],
}
KEPT = ("--cf-eplb-backward", "keep")
# Beside those of the same name that are sent again.
KEEPING = {
    "four ranks, two clones, kept": [FOUR_RANKS, lend("exact", 2, *KEPT), OVERLAPPED],
    "dualpipev, pairs, selective recompute, kept": [
        TWO_STAGES, lend("exact", 1, *KEPT), SHARDED, SELECTIVE_RECOMPUTE, SCHEDULES["dualpipev"], PAIRS
    ],
    "dualpipe, two clones, pairs, kept": [TWO_STAGES, lend("exact", 2, *KEPT), SHARDED, DUALPIPE, PAIRS],
    "1f1b, full recompute, kept": [TWO_STAGES, lend("exact", 1, *KEPT), FULL_RECOMPUTE, SCHEDULES["1f1b"]],
}  # fmt: skip
PREDICTING = {"MTP, zbv": [lend("exact"), ["--cf-schedule", "zbv"]]}


def list_cases(text: Path, directory: Path, steps: int, seed: int = SEEDS[0]) -> list[Case]:
    """Return the cases in an order in which each finds the checkpoint it starts from."""
    cases = Cases(directory, [*list_base_flags(text, directory), "--seed", str(seed)], steps)
    cases.add("initial", TWO_STAGES, plugin=False, steps=1, save=1)
    weights = cases.start_from("initial")
    cases.add("megatron, plain", TWO_STAGES, weights, plugin=False)
    cases.add("megatron, sharded", TWO_STAGES, weights, SHARDED, plugin=False)
    record = ["--cf-record", str(directory / "record")]
    for name, flags in (PLAIN | SHARDED_RUNS | MORE_PLAIN | MORE_SHARDED | KEEPING).items():
        cases.add(name, weights, *flags, *([record] if name == "1f1b, full recompute" else []))
    # The first stage has no experts. Other layouts draw other first weights.
    predicting = [*TWO_STAGES, *MTP, "--moe-layer-freq", "([0]*2+[1]*2)"]
    cases.add("initial, MTP", predicting, plugin=False, steps=1, save=1)
    predicting += cases.start_from("initial, MTP")
    cases.add("megatron, MTP", predicting, plugin=False)
    for name, flags in PREDICTING.items():
        cases.add(name, predicting, *flags)
    cases.add("dualpipe, again", weights, *SHARDED_RUNS["dualpipe"])
    staying = ["--cf-eplb-rehome-interval", "never"]
    cases.add("planned", weights, *MORE_PLAIN["1f1b"], staying, plans="made")
    # Clones cost next to nothing; by the costs of large experts none would pay for these few tokens.
    (directory / "costs.json").write_text('{"expert_bytes": 1, "clone_time": 1e-9}')
    costs = ["--cf-eplb-costs", str(directory / "costs.json")]
    auto = [TWO_STAGES, lend("auto"), SCHEDULES["1f1b"], staying]
    cases.add("planned, auto", weights, *auto, costs, plans="made")
    measured = ["--cf-eplb-measure-forced", str(MEASURED), "--cf-record", str(directory / "measured")]
    cases.add("planned, auto, measured", weights, *auto, costs, measured, plans="made")
    cases.add("planned, auto, large experts", weights, *auto, plans="made", steps=3)
    # The same case draws the same clones.
    names = [one["name"].removesuffix(", again").removesuffix(", kept") for one in cases]
    numbers = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return [{**case, "seed": seed + numbers[name]} for case, name in zip(cases, names, strict=True)]


def name_reference(name: str) -> str:
    """Return the name of the run beside which a case is looked at."""
    if name in PREDICTING:
        return "megatron, MTP"
    return "megatron, sharded" if name.removesuffix(", kept") in SHARDED_RUNS | MORE_SHARDED else "megatron, plain"
