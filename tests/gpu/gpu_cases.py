"""Trainings on GPUs of Megatron's local layers: two stages of two expert-parallel ranks, over NCCL."""

from pathlib import Path

from eplb_cases import CLONES, EVEN, FULL_RECOMPUTE, MOVING
from hybrid_cases import FOUR, GPT_ALONE, MADE_OF_LAYERS, PATTERN, TWO
from hybrid_cases import SCRIPT as HYBRID
from just_in_time_cases import lend
from tests.support.run_cases import Case
from tests.support.training import DUALPIPE, OVERLAPPED, SCHEDULES, SHARDED, TWO_STAGES, Cases, drop_flags, list_base_flags

STEPS = 4
BF16 = ["--bf16"]
V = SCHEDULES["dualpipev"]
PAIRED = [*V, "--cf-overlap"]
GATHERED = ["--moe-token-dispatcher-type", "allgather"]
# Under plain Megatron's run of the same numbers: all that leaves losses as they are.
FAMILIES = {
    "1f1b": SCHEDULES["1f1b"],
    "interleaved": [*SHARDED, *SCHEDULES["interleaved"]],
    "zbv": [*OVERLAPPED, "--cf-schedule", "zbv"],
    "dualpipev": V,
    "dualpipev, overlapped gradients": [*OVERLAPPED, *V],
    "dualpipev, whole backwards": [*V, "--no-cf-zero-bubble"],
    "dualpipe": [*SHARDED, *DUALPIPE],
}
PAIRS = {
    "pairs": [],
    "pairs, recomputed": FULL_RECOMPUTE,
    "pairs, allgather": GATHERED,
    "pairs, clones": CLONES[1],
    "pairs, bf16": BF16,
}
BALANCED = {
    "clones": [*V, *SHARDED, *CLONES[2]],
    "clones, even split": [*V, *CLONES[2], *EVEN],
    "clones, homes move": [*V, *OVERLAPPED, *CLONES[1], *MOVING],
}
# Other clones in every micro-batch, planned from its own counts.
LENT = {
    "just in time, exact": [*V, *SHARDED, *lend("exact")],
    "just in time, auto": [*SCHEDULES["1f1b"], *lend("auto")],
    "just in time, pairs": [*PAIRED, *lend("exact", 2)],
}


def list_cases(text: Path, directory: Path) -> list[Case]:
    """Return the cases, in an order in which each finds the checkpoint it starts from."""
    base = [*list_base_flags(text, directory), "--eval-iters", "0"]
    cases = Cases(directory, base, STEPS)
    cases.add("initial", TWO_STAGES, plugin=False, steps=1, save=1)
    start = cases.start_from("initial")
    cases.add("plain", TWO_STAGES, start, plugin=False)
    cases.add("bf16, plain", TWO_STAGES, start, BF16, plugin=False)
    for family, flags in FAMILIES.items():
        cases.add(family, TWO_STAGES, start, flags)
    cases.add("bf16, dualpipev", TWO_STAGES, start, BF16, V)
    for kind, flags in PAIRS.items():
        cases.add(f"{kind}, apart", TWO_STAGES, start, V, flags)
        cases.add(kind, TWO_STAGES, start, PAIRED, flags, ["--cf-record", str(directory / kind)])
    for kind, flags in (BALANCED | LENT).items():
        cases.add(kind, TWO_STAGES, start, flags)
    cases.add("profile", TWO_STAGES, start, PAIRED, ["--cf-profile", "3", "--cf-record", str(directory / "profile")])
    broken = ["--lr", "1e30", "--cf-stall-limit", "30", "--rerun-mode", "disabled"]
    cases.add("not a number", TWO_STAGES, start, V, broken, steps=40, may_fail=True)
    hybrid = Cases(directory, drop_flags([*base, *MADE_OF_LAYERS], *GPT_ALONE), STEPS)
    hybrid.add("initial, hybrid", TWO_STAGES, [PATTERN, TWO], plugin=False, steps=1, save=1, script=HYBRID)
    start = hybrid.start_from("initial, hybrid")
    hybrid.add("hybrid, plain", TWO_STAGES, start, [PATTERN, TWO], plugin=False, script=HYBRID)
    hybrid.add("hybrid, pairs", TWO_STAGES, start, [PATTERN, FOUR], SHARDED, PAIRED, script=HYBRID)
    return [*cases, *hybrid]
