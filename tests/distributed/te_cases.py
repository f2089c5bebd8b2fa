"""The cases of Transformer Engine: its modules under the schedules and recipes, beside plain Megatron's run of the same model."""

from pathlib import Path
from typing import Any

from eplb_cases import CLONES, FULL_RECOMPUTE, MOVING
from hybrid_cases import FOUR, GPT_ALONE, PATTERN, TWO
from hybrid_cases import SCRIPT as HYBRID
from tests.support.run_cases import Case
from tests.support.training import (
    CHUNKS,
    DUALPIPE,
    MTP,
    OVERLAPPED,
    SCHEDULES,
    SHARDED,
    TWO_STAGES,
    UNALIGNED,
    Cases,
    drop_flags,
    list_base_flags,
)

STEPS = 3

# Sizes that FP8 takes, and what of Transformer Engine runs on the CPU platform. Without clipping: it multiplies gradients by what
# comes of a sum over all stages, which each layout adds in an order of its own, and a last bit of it flips roundings to BF16.
SIZES = """
    --hidden-size 64 --ffn-hidden-size 128 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64
    --transformer-impl transformer_engine --moe-grouped-gemm --global-batch-size 8 --eval-iters 0 --clip-grad 0
""".split()
NOT_TAKEN = ("--use-cpu-initialization", "--no-gradient-accumulation-fusion")
UNFUSED = ["--no-gradient-accumulation-fusion"]
BF16 = ["--bf16"]
V = SCHEDULES["dualpipev"]
PAIRED = [*V, "--cf-overlap"]
WHOLE = [*V, "--no-cf-zero-bubble"]

RECIPES = {name: ["--fp8-format", "e4m3", "--fp8-recipe", name] for name in ("delayed", "tensorwise", "blockwise", "mxfp8")}
CAPABILITIES = {"mxfp8": "10.0"}
GATHER = [*SHARDED, "--fp8-param-gather"]
# Delayed scales begin with the largest value of the random first weights, which each layout draws otherwise, under plain Megatron
# too; so these are small beside those that are loaded.
GATHERS = {"delayed": [*GATHER, "--init-method-std", "1e-9"]}
GATHERS |= {"mxfp8": [*OVERLAPPED, "--fp8-param-gather", "--reuse-grad-buf-for-mxfp8-param-ag"]}
# How each family goes in BF16, and what it alone exercises.
FAMILIES = {
    "1f1b": SCHEDULES["1f1b"],
    "interleaved": [*SHARDED, *SCHEDULES["interleaved"]],
    "zb-h1": [*OVERLAPPED, "--cf-schedule", "zb-h1"],
    "zbv": [*UNALIGNED, "--cf-schedule", "zbv"],
    "dualpipev": V,
    "dualpipev, whole backwards": WHOLE,
    "dualpipev, overlapped pairs": [*OVERLAPPED, *PAIRED],
    "dualpipev, recomputed": [*V, *FULL_RECOMPUTE],
    "dualpipe": [*SHARDED, *DUALPIPE],
}
FP8_FAMILIES = {
    "1f1b": SCHEDULES["1f1b"],
    "zbv": ["--cf-schedule", "zbv"],
    "dualpipev": V,
    "dualpipev, whole backwards": WHOLE,
    "overlapped pairs": PAIRED,
    "dualpipe": DUALPIPE,
}
# Two prediction layers that are one, whose modules queue two entries for each micro-batch.
REPEATED = ["--mtp-num-layers", "2", "--mtp-use-repeated-layer"]
GRID = {
    "1f1b": SCHEDULES["1f1b"],
    "interleaved": SCHEDULES["interleaved"],
    "zbv": ["--cf-schedule", "zbv"],
    "zbv, whole backwards": ["--cf-schedule", "zbv", "--no-cf-zero-bubble"],
    "dualpipev": V,
    "dualpipev, whole backwards": WHOLE,
}
MADE_OF_ENGINE = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec".split()
# Shared experts have no biases upstream.
BIASED = ("--disable-bias-linear", "--moe-shared-expert-intermediate-size")


def list_engine_flags(text: Path | None, directory: Path) -> list[str]:
    """Return the flags that all trainings on Transformer Engine have."""
    return [*drop_flags(list_base_flags(text, directory), *NOT_TAKEN), *SIZES]


class EngineCases(Cases):
    """Cases on two stages, each with the name of its ``reference``: plain Megatron's run of its model.

    Those that are to equal it to all printed digits have no ``is_rounded``.
    """

    def __init__(self, directory: Path, base: list[str], steps: int) -> None:
        super().__init__(directory, base, steps)
        self.reference, self.start = "", list[str]()

    def train(self, name: str, *flags: list[str], recipe: str = "", **more: Any) -> None:
        """Add a training from the weights of the last `begin`, by a recipe of FP8, or else as the flags say."""
        chosen = [*BF16, *RECIPES[recipe]] if recipe else []
        capability = CAPABILITIES.get(recipe, "9.0")
        self.add(name, TWO_STAGES, self.start, chosen, *flags, capability=capability, reference=self.reference, **more)

    def refer(self, name: str, *flags: list[str], **more: Any) -> None:
        """Add plain Megatron's run, which is the reference of the trainings behind it."""
        self.reference = name
        self.train(name, *flags, plugin=False, **more)

    def begin(self, name: str, *flags: list[str], **more: Any) -> None:
        """Add the one step of plain Megatron that makes the first weights of the trainings behind it."""
        self.start, self.reference = [], name
        self.train(name, *flags, plugin=False, steps=1, save=1, **more)
        self.start = self.start_from(name)


def list_cases(text: Path, directory: Path, steps: int = STEPS, seed: str = "1234", *further: str) -> list[Case]:
    """Return the whole grid with these ``further`` flags, in an order in which each case finds the checkpoint it starts from."""
    base = [*list_engine_flags(text, directory), "--seed", seed, *further]
    cases = EngineCases(directory, base, steps)
    cases.begin("initial")
    _add_plain_numbers(cases)
    _add_plain_grid(cases)
    for recipe in RECIPES:
        _add_recipe(cases, recipe)
    cases.begin("initial, biased", without=BIASED)
    cases.refer("biased", without=BIASED)
    cases.train("biased, dualpipev, clones", OVERLAPPED, V, CLONES[2], without=BIASED)
    cases.begin("initial, MTP", MTP)
    cases.refer("MTP", MTP, BF16)
    cases.train("MTP, dualpipev", MTP, BF16, OVERLAPPED, V)
    cases.train("MTP, overlapped pairs", MTP, BF16, OVERLAPPED, PAIRED)
    cases.begin("initial, repeated MTP", REPEATED)
    cases.refer("repeated MTP", REPEATED, BF16)
    cases.train("repeated MTP, dualpipev", REPEATED, BF16, OVERLAPPED, V)
    cases.refer("repeated MTP, blockwise", REPEATED, recipe="blockwise")
    cases.train("repeated MTP, blockwise, dualpipev", REPEATED, V, recipe="blockwise")
    hybrid = EngineCases(directory, drop_flags([*base, *MADE_OF_ENGINE], *GPT_ALONE), steps)
    hybrid.begin("initial, hybrid", [PATTERN, TWO], script=HYBRID)
    for recipe in ("", "blockwise"):
        name, numbers = f"hybrid {recipe or 'bf16'}", [] if recipe else BF16
        hybrid.refer(name, [PATTERN, TWO], numbers, recipe=recipe, script=HYBRID)
        hybrid.train(f"{name}, dualpipev", [PATTERN, FOUR], V, numbers, recipe=recipe, script=HYBRID)
    return [*cases, *hybrid]


def _add_plain_numbers(cases: EngineCases) -> None:
    cases.refer("fp32")
    for family, flags in FAMILIES.items():
        cases.train(f"fp32, {family}", flags)
    cases.train("fp32, dualpipev, clones", SHARDED, V, CLONES[2])
    cases.refer("bf16", BF16)
    cases.train("bf16, no flag", BF16)
    for family, flags in FAMILIES.items():
        cases.train(f"bf16, {family}", BF16, flags, is_rounded=family == "dualpipe")
    cases.train("bf16, dualpipev, clones", BF16, SHARDED, V, CLONES[2], is_rounded=True)
    cases.refer("bf16, unfused", BF16, UNFUSED)
    cases.train("bf16, unfused, dualpipev", BF16, UNFUSED, V)
    cases.train("bf16, unfused, dualpipev, clones", BF16, UNFUSED, OVERLAPPED, V, CLONES[2], is_rounded=True)


def _add_plain_grid(cases: EngineCases) -> None:
    """Add every family, with weight gradients split and whole, by kind of numbers, way of accumulation and optimizer.

    The first of each kind is plain Megatron's own interleaved schedule, to see what another layout changes without the plugin.
    """
    for numbers, flags in {"fp32": [], "bf16": BF16}.items():
        for way, unfused in {"fused": [], "unfused": UNFUSED}.items():
            cases.refer(f"grid {numbers} {way}", flags, unfused)
            cases.train(f"grid {numbers} {way}, plain interleaved", flags, unfused, CHUNKS, plugin=False)
            for optimizer, sharded in {"plain": [], "distributed": OVERLAPPED}.items():
                for family, schedule in GRID.items():
                    cases.train(f"grid {numbers} {way} {optimizer}, {family}", flags, unfused, sharded, schedule)


def _add_recipe(cases: EngineCases, recipe: str) -> None:
    cases.refer(recipe, recipe=recipe)
    # One scale for all tokens that come together, where others come together than in plain Megatron.
    is_rounded = recipe == "tensorwise"
    for family, flags in FP8_FAMILIES.items():
        cases.train(f"{recipe}, {family}", flags, recipe=recipe, is_rounded=is_rounded and family == "dualpipe")
    if recipe != "delayed":
        cases.train(f"{recipe}, dualpipev, clones", V, CLONES[2], recipe=recipe, is_rounded=is_rounded)
        cases.train(f"{recipe}, homes move", CLONES[1], MOVING, recipe=recipe, is_rounded=is_rounded)
    cases.refer(f"{recipe}, recomputed", FULL_RECOMPUTE, recipe=recipe)
    for family in ("dualpipev", "overlapped pairs"):
        cases.train(f"{recipe}, recomputed, {family}", FULL_RECOMPUTE, FP8_FAMILIES[family], recipe=recipe)
    gather = GATHERS.get(recipe, GATHER)
    cases.refer(f"{recipe}, gathered", gather, recipe=recipe)
    for family in ("1f1b", "dualpipev"):
        cases.train(f"{recipe}, gathered, {family}", gather, FP8_FAMILIES[family], recipe=recipe)
