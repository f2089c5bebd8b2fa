"""The training cases: the example's model made small, under every schedule and with what goes with it."""

from pathlib import Path

from counterflow.schedule import build, to_csv
from tests.support.run_cases import Case
from tests.support.training import (
    CHUNKS,
    DUALPIPE,
    MTP,
    OVERLAPPED,
    SCHEDULES,
    SHARDED,
    TENSOR_PARALLEL,
    TWO_STAGES,
    UNALIGNED,
    UNTIE,
    Cases,
    list_base_flags,
)

STEPS = 10
SAVED = 5
RESUMED = SAVED + 2

FOUR_STAGES = (
    "--seed 4321 --pipeline-model-parallel-size 4 --num-layers 8 --moe-layer-freq ([0]*1+[1]*7) --global-batch-size 8".split()
)
LOGGED = """
    --log-memory-to-tensorboard --log-device-memory-used --log-memory-interval 1 --log-timers-to-tensorboard --timing-log-level 2
    --log-params-norm --log-num-zeros-in-grad --profile --profile-step-start 1 --profile-step-end 2
""".split()
RESHARDABLE = ("--dist-ckpt-optim-fully-reshardable",)
PARALLEL_LOAD = ["--ckpt-fully-parallel-load"]

# How the other families go: what each of them alone exercises.
FAMILIES = {
    "gpipe": ["--cf-schedule", "gpipe"],
    "zb-h1": ["--cf-schedule", "zb-h1", *OVERLAPPED],
    "zbv": ["--cf-schedule", "zbv", *UNALIGNED],
    "dualpipev, no zero bubble": ["--cf-schedule", "dualpipev", "--no-cf-zero-bubble"],
}
DATA = Path(__file__).resolve().parents[1] / "data"
SEARCHED = {
    "searched V": ["--cf-schedule", str(DATA / "searched-v.csv")],
    "searched looped": ["--cf-schedule", str(DATA / "searched-looped.csv"), *CHUNKS],
}
# From 4 micro-batches of each replica to 6 at step 3 (thresholds are tokens); steps 2 and 5 are left out.
GROWING = ["--step-batch-size-schedule", "0:8 512:12", "--iterations-to-skip", "2", "5"]
# By seed: the schedules that train so.
GROWN = {
    "1234": {"dualpipev": SCHEDULES["dualpipev"], "interleaved": SCHEDULES["interleaved"], "dualpipe": [*SHARDED, *DUALPIPE]},
    "99": {"dualpipev": [*OVERLAPPED, *SCHEDULES["dualpipev"], "--cf-eplb"], "interleaved": SCHEDULES["interleaved"]},
}
VARIANTS = {
    "overlap": OVERLAPPED,
    "overlap, not aligned": UNALIGNED,
    # With a switch of Megatron's own transfers, which it refuses on two pipeline ranks.
    "per-token loss": ["--calculate-per-token-loss", "--no-overlap-p2p-communication"],
    "fp16, dynamic loss scale": ["--fp16", "--initial-loss-scale", "65536", "--loss-scale-window", "2"],
    "bf16": ["--bf16"],
    "bf16, overlapped pairs": ["--bf16", "--cf-overlap", *OVERLAPPED],
    "selective recompute": ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "moe"],
}
# In fp32: what Megatron's own pairs refuse.
WHOLE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
PAIRS = {
    "overlapped pairs": [],
    "overlapped pairs, recomputed, shared experts in overlap": [*WHOLE, "--moe-shared-expert-overlap"],
    "overlapped pairs, allgather": ["--moe-token-dispatcher-type", "allgather", *WHOLE],
}
PROFILED = ("overlapped pairs, recomputed, shared experts in overlap",)
# These change the numbers, and to whose; the others must leave plain Megatron's as they are.
OWN_REFERENCE = {"fp16, dynamic loss scale": "fp16, dynamic loss scale", "bf16": "bf16", "bf16, overlapped pairs": "bf16"}


def list_cases(text: Path, directory: Path) -> list[Case]:
    """Return the cases in an order in which each finds the checkpoint it starts from."""
    cases = Cases(directory, list_base_flags(text, directory), STEPS)
    # One step of plain Megatron makes the weights that all runs start from; it never sees the plugin.
    cases.add("initial", TWO_STAGES, plugin=False, steps=1, save=1)
    start = [*TWO_STAGES, *cases.start_from("initial")]
    _add_schedules(cases, start, directory)
    _add_resumed(cases, start)
    _add_variants(cases, start, directory)
    _add_four_stages(cases)
    _add_tied(cases, start)
    _add_multi_token_prediction(cases)
    for seed, schedules in GROWN.items():
        growing = [*start, *GROWING, "--seed", seed]
        cases.add(f"megatron 1f1b, growing, {seed}", growing, plugin=False, steps=6, without=("--global-batch-size",))
        for schedule, chosen in schedules.items():
            record = ["--cf-record", str(directory / f"record, growing, {seed}, {schedule}")]
            cases.add(f"{schedule}, growing, {seed}", growing, chosen, record, steps=6, without=("--global-batch-size",))
    # The reference has neither: splitting a layer leaves the numbers as they are.
    cases.add("dualpipev, TP 2", TENSOR_PARALLEL, cases.start_from("initial"), SCHEDULES["dualpipev"], steps=3)
    _add_fitted(cases, start, str(directory / "overwritten.csv"))
    # Last, since it ends in the middle of a step: a learning rate that makes the second step's losses NaN.
    diverging = "--lr 1e30 --min-lr 1e30 --clip-grad 0 --lr-warmup-iters 0 --rerun-mode disabled".split()
    cases.add("NaN", start, SCHEDULES["dualpipev"], diverging, steps=4, save=1, may_fail=True)
    return cases


def _add_schedules(cases: Cases, start: list[str], directory: Path) -> None:
    for optimizer, flags in {"plain": [], "sharded": SHARDED}.items():
        cases.add(f"megatron 1f1b, {optimizer}", start, flags, plugin=False)
        for schedule, chosen in SCHEDULES.items():
            cases.add(f"{schedule}, {optimizer}", start, flags, chosen, save=SAVED)
    cases.add("no flag", start, SHARDED)
    cases.add("table.csv", start, ["--cf-schedule", str(directory / "table.csv")], steps=3)
    record = [*SCHEDULES["dualpipev"], "--cf-record", str(directory / "record")]
    # With what Megatron itself can log of a device.
    logged = [*LOGGED, "--tensorboard-dir", str(directory / "tensorboard")]
    cases.add("recorded", start, record, logged, steps=3, save=2)
    cases.add("recorded, resumed", TWO_STAGES, record, cases.resume_from("recorded", 2), steps=4)
    # The search ends in the middle, with an evaluation before.
    found = ["--cf-schedule", "auto", "--cf-record", str(directory / "record, auto")]
    cases.add("auto", start, SHARDED, found, script=str(Path(__file__).with_name("pretrain_auto.py")))
    for name, chosen in (FAMILIES | SEARCHED).items():
        cases.add(name, start, chosen, steps=4)


def _add_resumed(cases: Cases, start: list[str]) -> None:
    # Two replicas cross-linked, the expert-parallel group spans the pair; the checkpoint is that of a V.
    cases.add("dualpipe, sharded", start, SHARDED, DUALPIPE, save=SAVED)
    cases.add("dualpipe, overlap, per-token loss", start, OVERLAPPED, VARIANTS["per-token loss"], DUALPIPE, steps=3)
    pairs = [(saved, loaded, "sharded") for saved in SCHEDULES for loaded in SCHEDULES]
    pairs += [("dualpipe", "1f1b", "sharded"), ("dualpipev", "dualpipe", "sharded")]
    for saved, loaded, optimizer in (*pairs, ("dualpipev", "1f1b", "plain"), ("1f1b", "dualpipev", "plain")):
        source = f"{saved}, {optimizer}"
        flags = [*(SHARDED if optimizer == "sharded" else []), *(SCHEDULES | {"dualpipe": DUALPIPE})[loaded]]
        cases.add(f"{source} -> {loaded}", TWO_STAGES, flags, cases.resume_from(source, SAVED), steps=RESUMED)


def _add_variants(cases: Cases, start: list[str], directory: Path) -> None:
    for variant, flags in VARIANTS.items():
        if variant == OWN_REFERENCE.get(variant):
            cases.add(f"megatron 1f1b, {variant}", start, flags, plugin=False, steps=3)
        cases.add(f"dualpipev, {variant}", start, flags, SCHEDULES["dualpipev"], steps=3)
    for name, flags in PAIRS.items():
        profile = ["--cf-profile", "2", "--cf-record", str(directory / f"profile, {name}")] if name in PROFILED else []
        cases.add(f"dualpipev, {name}", start, ["--cf-overlap"], flags, profile, SCHEDULES["dualpipev"], steps=3)
    cases.add("dualpipe, overlapped pairs", start, ["--cf-overlap"], SHARDED, DUALPIPE, steps=3)
    cases.add("interleaved, overlapped pairs", start, ["--bf16", "--cf-overlap"], SCHEDULES["interleaved"], steps=3)
    varying = str(Path(__file__).with_name("pretrain_varying.py"))
    cases.add("megatron 1f1b, varying lengths", start, plugin=False, steps=3, script=varying)
    cases.add("dualpipev, varying lengths", start, SCHEDULES["dualpipev"], steps=3, script=varying)
    cases.add("interleaved, overlap", start, OVERLAPPED, SCHEDULES["interleaved"], steps=3)


def _add_four_stages(cases: Cases) -> None:
    cases.add("initial, four stages", FOUR_STAGES, plugin=False, steps=1, save=1)
    start = [*FOUR_STAGES, *cases.start_from("initial, four stages")]
    cases.add("megatron 1f1b, four stages", start, plugin=False, steps=3)
    for schedule, chosen in SCHEDULES.items():
        cases.add(f"{schedule}, four stages", start, chosen, steps=3)


def _add_tied(cases: Cases, start: list[str]) -> None:
    """Tie the embeddings: the last stage's output weight is a copy of the first stage's embedding.

    Saved without the distributed optimizer: where padding lies between its buckets, Megatron's fully reshardable form saves them
    shifted. Loaded with the ranks reading for each other, in which both copies have one name.
    """
    tied, turned = "megatron 1f1b, tied", "megatron 1f1b, tied -> dualpipev"
    cases.add(tied, start, plugin=False, steps=4, save=2, without=(UNTIE,))
    cases.add("dualpipev, tied", start, OVERLAPPED, SCHEDULES["dualpipev"], steps=4, without=(UNTIE,))
    resumed = [*cases.resume_from(tied, 2), *PARALLEL_LOAD]
    cases.add(turned, TWO_STAGES, SCHEDULES["dualpipev"], resumed, steps=4, save=1, without=(UNTIE,))
    cases.add(f"{turned} -> 1f1b", TWO_STAGES, SCHEDULES["1f1b"], cases.resume_from(turned, 3), steps=4, without=(UNTIE,))


def _add_multi_token_prediction(cases: Cases) -> None:
    """One layer of multi-token prediction, on the last stage, which holds a copy of the embedding for it."""
    layout = [*TWO_STAGES, *MTP]
    cases.add("initial, MTP", layout, plugin=False, steps=1, save=1)
    start = [*layout, *cases.start_from("initial, MTP")]
    cases.add("megatron 1f1b, MTP", start, plugin=False, steps=3)
    uneven = ["--pipeline-model-parallel-layout", "Et|tt|t|mL"]
    cases.add("dualpipev, MTP, uneven layout", start, OVERLAPPED, SCHEDULES["dualpipev"], uneven, steps=3)
    # In bf16 it shows in which order the output weight's two gradients are added up.
    half, plain, v = ["--bf16", "--seed", "4321"], "megatron 1f1b, MTP, bf16", "dualpipev, MTP, bf16"
    cases.add(plain, start, half, plugin=False, steps=4, save=2)
    cases.add(v, start, half, OVERLAPPED, SCHEDULES["dualpipev"], steps=4, save=2, without=RESHARDABLE)
    # The optimizer's state once whole, and once in the distributed optimizer's default form.
    for saved, flags, form in ((plain, [], ()), (v, OVERLAPPED, RESHARDABLE)):
        resumed = [*cases.resume_from(saved, 2), *PARALLEL_LOAD]
        cases.add(f"{saved} -> dualpipe", layout, half, flags, DUALPIPE, resumed, steps=4, without=form)
    # Megatron's own schedule with pairs, whose plans send to other ranks while their nodes run on the platform's streams.
    pairs = [*half, "--overlap-moe-expert-parallel-comm", *CHUNKS]
    cases.add("megatron's own pairs, MTP, bf16", start, pairs, plugin=False, steps=2)


def _add_fitted(cases: Cases, start: list[str], path: str) -> None:
    """Optimizer state written under one layout in a form that only fits it; refused under another.

    Then with the layout in a file, which another layout overwrites before the checkpoint is read. In bf16: Megatron on its own
    does not load this form of fp32 weights.
    """
    sharded = [*TWO_STAGES, *SHARDED]
    cases.add("fitted", sharded, SCHEDULES["dualpipev"], steps=2, save=2, without=RESHARDABLE)
    load = cases.start_from("fitted")[:2]
    cases.add("fitted -> interleaved", sharded, SCHEDULES["interleaved"], load, without=RESHARDABLE, may_fail=True)

    tables = {"v": build("dualpipev", 2, 6), "looped": build("interleaved", 2, 6, vpp=2)}
    files = {name: {path: to_csv(table)} for name, table in tables.items()}
    half, chosen = [*SHARDED, "--bf16"], ["--cf-schedule", path, *CHUNKS]
    name = "table.csv, fitted"
    cases.add(name, start, half, chosen, steps=2, save=2, without=RESHARDABLE, files=files["v"])
    resumed = [*TWO_STAGES, *half, *cases.resume_from(name, 2)]
    cases.add(f"{name} -> overwritten", resumed, chosen, without=RESHARDABLE, files=files["looped"], may_fail=True)
    cases.add(f"{name} -> dualpipev", resumed, SCHEDULES["dualpipev"], steps=3, without=RESHARDABLE)
