"""The cases of HybridModel: a pattern of attention, dense and expert layers, on the local layers of the CPU platform."""

from pathlib import Path
from typing import Any

from eplb_cases import CLONES, MOVING
from tests.support.run_cases import Case
from tests.support.training import DUALPIPE, OVERLAPPED, SHARDED, TWO_STAGES, UNALIGNED, UNTIE, Cases, drop_flags, list_base_flags

SCRIPT = str(Path(__file__).with_name("pretrain_hybrid.py"))
STEPS = 4
SAVED = 2

MADE_OF_LAYERS = ["--spec", "counterflow.platform.hybrid_layers", "stack"]
# Not known to HybridModel, or said by its pattern.
GPT_ALONE = ("--num-layers", "--moe-layer-freq", "--qk-layernorm")
# Stages are of unequal length, the first of four has no experts.
TWO, FOUR = "*-*E|*E*E", "*-|*E|*E*|E"
WHOLE = "*-*E*E*E"
PATTERN = "--hybrid-layer-pattern"
# How each family goes: the pattern of its stages, and what it alone exercises.
FAMILIES = {
    "1f1b": [PATTERN, TWO, "--cf-schedule", "1f1b"],
    "gpipe": [PATTERN, WHOLE, "--cf-schedule", "gpipe"],
    "zb-h1": [PATTERN, TWO, *OVERLAPPED, "--cf-schedule", "zb-h1"],
    "interleaved": [PATTERN, FOUR, "--cf-schedule", "interleaved"],
    "zbv": [PATTERN, WHOLE, *UNALIGNED, "--cf-schedule", "zbv"],
    "dualpipev": [PATTERN, FOUR, *SHARDED, "--cf-schedule", "dualpipev"],
    "dualpipe": [PATTERN, FOUR, *OVERLAPPED, *DUALPIPE],
}
# Auxiliary losses go into Megatron's own log of MoE metrics.
AUXILIARY = """
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 --moe-per-layer-logging
""".split()
V = [PATTERN, FOUR, "--cf-schedule", "dualpipev"]
CLONED = {
    "clones": [PATTERN, TWO, *CLONES[1]],
    "clones, 1f1b": [PATTERN, TWO, *CLONES[2], "--cf-schedule", "1f1b"],
    "clones, dualpipev, homes move": [*V, *SHARDED, *CLONES[2], *MOVING],
    "clones, dualpipe": [PATTERN, FOUR, *OVERLAPPED, *CLONES[1], *DUALPIPE],
}
EXPERTS_IN_ALL = ["--moe-layer-freq", "1"]


def list_cases(text: Path, directory: Path) -> list[Case]:
    """Return the cases in an order in which each finds the checkpoint it starts from."""
    base = list_base_flags(text, directory)
    cases = Cases(directory, drop_flags([*base, *MADE_OF_LAYERS], *GPT_ALONE), STEPS)

    def add(name: str, *flags: list[str], **more: Any) -> None:
        cases.add(name, *flags, script=SCRIPT, plans="drawn", seed=len(cases), **more)

    add("initial", TWO_STAGES, [PATTERN, TWO], plugin=False, steps=1, save=1)
    start = cases.start_from("initial")
    add("megatron", TWO_STAGES, start, [PATTERN, TWO], AUXILIARY, plugin=False, save=SAVED)
    for family, chosen in FAMILIES.items():
        add(family, TWO_STAGES, start, AUXILIARY, chosen, save=SAVED if family == "zbv" else 0)
    for name, flags in CLONED.items():
        add(name, TWO_STAGES, start, AUXILIARY, flags)
    add("dualpipev, overlapped pairs", TWO_STAGES, start, AUXILIARY, SHARDED, V, ["--cf-overlap"])
    # Optimizer state goes both ways, between layouts and cuts.
    add("megatron -> dualpipev", TWO_STAGES, AUXILIARY, cases.resume_from("megatron", SAVED), V)
    add("zbv -> megatron", TWO_STAGES, [PATTERN, TWO], AUXILIARY, cases.resume_from("zbv", SAVED), SHARDED, plugin=False)

    add("initial, tied", TWO_STAGES, [PATTERN, TWO], plugin=False, steps=1, save=1, without=(UNTIE,))
    start = cases.start_from("initial, tied")
    add("megatron, tied", TWO_STAGES, start, [PATTERN, TWO], plugin=False, steps=3, without=(UNTIE,))
    add("dualpipev, tied", TWO_STAGES, start, OVERLAPPED, V, steps=3, without=(UNTIE,))

    # Two prediction layers of two each; their layers of experts are numbered behind the model's eight.
    predicting = [PATTERN, f"{TWO}/*E/*E"]
    add("initial, MTP", TWO_STAGES, predicting, plugin=False, steps=1, save=1)
    start = cases.start_from("initial, MTP")
    add("megatron, MTP", TWO_STAGES, start, predicting, plugin=False, steps=3)
    chosen = [PATTERN, f"{FOUR}/*E/*E", "--cf-schedule", "dualpipev"]
    record = ["--cf-record", str(directory / "record, MTP")]
    add("dualpipev, MTP, clones", TWO_STAGES, start, SHARDED, chosen, CLONES[1], record, steps=3)
    profile = ["--cf-profile", "2", "--cf-record", str(directory / "profile, MTP")]
    add("dualpipev, MTP, overlapped pairs", TWO_STAGES, start, chosen, ["--cf-overlap"], profile, steps=3)

    # What a GPTModel learned goes on as a HybridModel, two layers for each of its blocks.
    gpt = drop_flags([*base, *TWO_STAGES, *EXPERTS_IN_ALL], "--qk-layernorm")
    gpt += ["--train-iters", "2", "--save", str(directory / "gpt"), "--save-interval", "2"]
    cases.append({"name": "gpt", "plugin": False, "flags": gpt})
    start = cases.start_from("gpt")
    add("gpt -> megatron", TWO_STAGES, start, [PATTERN, "*E*E|*E*E"], plugin=False, steps=3)
    add("gpt -> dualpipev", TWO_STAGES, start, [PATTERN, "*E*E*E*E", "--cf-schedule", "dualpipev"], steps=3)

    four = ["--seed", "4321", "--pipeline-model-parallel-size", "4"]
    add("initial, four stages", four, [PATTERN, "*-|*E|*E|*E"], plugin=False, steps=1, save=1)
    start = cases.start_from("initial, four stages")
    add("megatron, four stages", four, start, [PATTERN, "*-|*E|*E|*E"], plugin=False, steps=3)
    add("dualpipev, four stages", four, start, [PATTERN, WHOLE, "--cf-schedule", "dualpipev"], steps=3)
    return cases
