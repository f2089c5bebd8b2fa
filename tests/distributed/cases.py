"""The training cases: the example's model made small, under every schedule and with what goes with it."""

from pathlib import Path
from typing import Any

from counterflow.schedule import build, to_csv
from train import read_flags

STEPS = 10
SAVED = 5
RESUMED = SAVED + 2

SMALL = """
    --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --ffn-hidden-size 64
    --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16
    --num-experts 4 --moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk 2
    --micro-batch-size 1 --global-batch-size 12 --lr-warmup-iters 2 --eval-interval 5 --eval-iters 1 --split 80,10,10
    --distributed-timeout-minutes 2 --num-workers 0 --make-vocab-size-divisible-by 4
""".split()
TWO_STAGES = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2".split()
FOUR_STAGES = (
    "--seed 4321 --pipeline-model-parallel-size 4 --num-layers 8 --moe-layer-freq ([0]*1+[1]*7) --global-batch-size 8".split()
)
# Upstream pads the vocabulary to a multiple of this times TP: to 260, as without TP.
TENSOR_PARALLEL = """
    --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 2
""".split()
LOGGED = """
    --log-memory-to-tensorboard --log-device-memory-used --log-memory-interval 1 --log-timers-to-tensorboard --timing-log-level 2
    --log-params-norm --log-num-zeros-in-grad --profile --profile-step-start 1 --profile-step-end 2
""".split()
MTP = ["--mtp-num-layers", "1"]
UNTIE = "--untie-embeddings-and-output-weights"
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
PARALLEL_LOAD = "--ckpt-fully-parallel-load"
SHARDED = ["--use-distributed-optimizer"]
OVERLAPPED = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
UNALIGNED = [*OVERLAPPED, "--no-align-grad-reduce", "--no-align-param-gather"]

CHUNKS = ["--num-virtual-stages-per-pipeline-rank", "2"]
SCHEDULES = {
    "1f1b": ["--cf-schedule", "1f1b"],
    "interleaved": ["--cf-schedule", "interleaved", *CHUNKS],
    "dualpipev": ["--cf-schedule", "dualpipev"],
}
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
DUALPIPE = ["--cf-schedule", "dualpipe"]
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
# These change the numbers, and to whose; the others must leave plain Megatron's as they are.
OWN_REFERENCE = {"fp16, dynamic loss scale": "fp16, dynamic loss scale", "bf16": "bf16", "bf16, overlapped pairs": "bf16"}


def list_cases(text: Path, directory: Path) -> list[dict[str, Any]]:
    """Return the cases in an order in which each finds the checkpoint it starts from."""
    base = [flag for flag in read_flags("deepseek-v3-small.args") + read_flags("cpu.args") if flag not in SHARDED]
    base += [*SMALL, "--data-path", str(text), "--data-cache-path", str(directory / "cache")]

    cases: list[dict[str, Any]] = []

    def add(
        name: str,
        *flags: list[str],
        plugin: bool = True,
        steps: int = STEPS,
        without: str = "",
        may_fail: bool = False,
        script: str | None = None,
        files: dict[str, str] | None = None,
    ) -> None:
        flat = [*base, "--train-iters", str(steps), *(flag for some in flags for flag in some)]
        flat = drop_flags(flat, (without,))
        own = {name: value for name, value in (("script", script), ("files", files)) if value is not None}
        cases.append({"name": name, "plugin": plugin, "flags": flat, "may_fail": may_fail, **own})

    def start_from(name: str) -> list[str]:
        return ["--load", str(directory / name), "--finetune", "--no-load-optim", "--no-load-rng"]

    def save_to(name: str, interval: int) -> list[str]:
        return ["--save", str(directory / name), "--save-interval", str(interval)]

    # One step of plain Megatron makes the weights that all runs start from; it never sees the plugin.
    add("initial", TWO_STAGES, save_to("initial", 1), plugin=False, steps=1)
    start = start_from("initial")
    for optimizer, flags in {"plain": [], "sharded": SHARDED}.items():
        add(f"megatron 1f1b, {optimizer}", TWO_STAGES, start, flags, plugin=False)
        for schedule, chosen in SCHEDULES.items():
            name = f"{schedule}, {optimizer}"
            add(name, TWO_STAGES, start, flags, chosen, save_to(name, SAVED))
    add("no flag", TWO_STAGES, start, SHARDED)
    add("table.csv", TWO_STAGES, start, ["--cf-schedule", str(directory / "table.csv")], steps=3)
    record = [*SCHEDULES["dualpipev"], "--cf-record", str(directory / "record")]
    # With what Megatron itself can log of a device.
    logged = [*LOGGED, "--tensorboard-dir", str(directory / "tensorboard")]
    add("recorded", TWO_STAGES, start, record, logged, save_to("recorded", 2), steps=3)
    add("recorded, resumed", TWO_STAGES, record, ["--load", str(directory / "recorded"), "--ckpt-step", "2"], steps=4)

    for name, chosen in FAMILIES.items():
        add(name, TWO_STAGES, start, chosen, steps=4)
    # The search ends in the middle, with an evaluation before.
    found = ["--cf-schedule", "auto", "--cf-record", str(directory / "record, auto")]
    add("auto", TWO_STAGES, start, SHARDED, found, script=str(Path(__file__).with_name("pretrain_auto.py")))
    for name, chosen in SEARCHED.items():
        add(name, TWO_STAGES, start, chosen, steps=4)

    for saved in SCHEDULES:
        for loaded, chosen in SCHEDULES.items():
            source = f"{saved}, sharded"
            resumed = ["--load", str(directory / source), "--ckpt-step", str(SAVED)]
            add(f"{source} -> {loaded}", TWO_STAGES, SHARDED, chosen, resumed, steps=RESUMED)
    for saved, loaded in (("dualpipev", "1f1b"), ("1f1b", "dualpipev")):
        source = f"{saved}, plain"
        resumed = ["--load", str(directory / source), "--ckpt-step", str(SAVED)]
        add(f"{source} -> {loaded}", TWO_STAGES, SCHEDULES[loaded], resumed, steps=RESUMED)

    # Two replicas cross-linked, the expert-parallel group spans the pair; the checkpoint is that of a V.
    add("dualpipe, sharded", TWO_STAGES, start, SHARDED, DUALPIPE, save_to("dualpipe, sharded", SAVED))
    add("dualpipe, overlap, per-token loss", TWO_STAGES, start, OVERLAPPED, VARIANTS["per-token loss"], DUALPIPE, steps=3)
    for saved, loaded, chosen in (("dualpipe", "1f1b", SCHEDULES["1f1b"]), ("dualpipev", "dualpipe", DUALPIPE)):
        source = f"{saved}, sharded"
        resumed = ["--load", str(directory / source), "--ckpt-step", str(SAVED)]
        add(f"{source} -> {loaded}", TWO_STAGES, SHARDED, chosen, resumed, steps=RESUMED)

    for variant, flags in VARIANTS.items():
        if variant == OWN_REFERENCE.get(variant):
            add(f"megatron 1f1b, {variant}", TWO_STAGES, start, flags, plugin=False, steps=3)
        add(f"dualpipev, {variant}", TWO_STAGES, start, flags, SCHEDULES["dualpipev"], steps=3)
    for name, flags in PAIRS.items():
        add(f"dualpipev, {name}", TWO_STAGES, start, ["--cf-overlap"], flags, SCHEDULES["dualpipev"], steps=3)
    add("dualpipe, overlapped pairs", TWO_STAGES, start, ["--cf-overlap"], SHARDED, DUALPIPE, steps=3)
    add("interleaved, overlapped pairs", TWO_STAGES, start, ["--bf16", "--cf-overlap"], SCHEDULES["interleaved"], steps=3)
    varying = str(Path(__file__).with_name("pretrain_varying.py"))
    add("megatron 1f1b, varying lengths", TWO_STAGES, start, plugin=False, steps=3, script=varying)
    add("dualpipev, varying lengths", TWO_STAGES, start, SCHEDULES["dualpipev"], steps=3, script=varying)
    add("interleaved, overlap", TWO_STAGES, start, OVERLAPPED, SCHEDULES["interleaved"], steps=3)

    add("initial, four stages", FOUR_STAGES, save_to("initial, four stages", 1), plugin=False, steps=1)
    begin = start_from("initial, four stages")
    add("megatron 1f1b, four stages", FOUR_STAGES, begin, plugin=False, steps=3)
    for schedule, chosen in SCHEDULES.items():
        add(f"{schedule}, four stages", FOUR_STAGES, begin, chosen, steps=3)

    # Tied embeddings: the last stage's output weight is a copy of the first stage's embedding. Saved without the distributed
    # optimizer: where padding lies between its buckets, Megatron's fully reshardable form saves them shifted. Loaded with the
    # ranks reading for each other, in which both copies have one name.
    tied, turned = "megatron 1f1b, tied", "megatron 1f1b, tied -> dualpipev"
    add(tied, TWO_STAGES, start, save_to(tied, 2), plugin=False, steps=4, without=UNTIE)
    add("dualpipev, tied", TWO_STAGES, start, OVERLAPPED, SCHEDULES["dualpipev"], steps=4, without=UNTIE)
    resumed = ["--load", str(directory / tied), "--ckpt-step", "2", PARALLEL_LOAD, *save_to(turned, 1)]
    add(turned, TWO_STAGES, SCHEDULES["dualpipev"], resumed, steps=4, without=UNTIE)
    resumed = ["--load", str(directory / turned), "--ckpt-step", "3"]
    add(f"{turned} -> 1f1b", TWO_STAGES, SCHEDULES["1f1b"], resumed, steps=4, without=UNTIE)

    # One layer of multi-token prediction, on the last stage, which holds a copy of the embedding for it.
    add("initial, MTP", TWO_STAGES, MTP, save_to("initial, MTP", 1), plugin=False, steps=1)
    begin = start_from("initial, MTP")
    add("megatron 1f1b, MTP", TWO_STAGES, MTP, begin, plugin=False, steps=3)
    uneven = ["--pipeline-model-parallel-layout", "Et|tt|t|mL"]
    add("dualpipev, MTP, uneven layout", TWO_STAGES, MTP, begin, OVERLAPPED, SCHEDULES["dualpipev"], uneven, steps=3)
    # In bf16 it shows in which order the output weight's two gradients are added up.
    half, plain, v = ["--bf16", "--seed", "4321"], "megatron 1f1b, MTP, bf16", "dualpipev, MTP, bf16"
    add(plain, TWO_STAGES, MTP, begin, half, save_to(plain, 2), plugin=False, steps=4)
    flags = [*OVERLAPPED, *SCHEDULES["dualpipev"], *save_to(v, 2)]
    add(v, TWO_STAGES, MTP, begin, half, flags, steps=4, without=RESHARDABLE)
    # The optimizer's state once whole, and once in the distributed optimizer's default form.
    for saved, flags, form in ((plain, [], ""), (v, OVERLAPPED, RESHARDABLE)):
        resumed = ["--load", str(directory / saved), "--ckpt-step", "2", PARALLEL_LOAD]
        add(f"{saved} -> dualpipe", TWO_STAGES, MTP, half, flags, DUALPIPE, resumed, steps=4, without=form)

    for seed, schedules in GROWN.items():
        growing = [*GROWING, "--seed", seed]
        add(f"megatron 1f1b, growing, {seed}", TWO_STAGES, start, growing, plugin=False, steps=6, without="--global-batch-size")
        for schedule, chosen in schedules.items():
            recorded = ["--cf-record", str(directory / f"record, growing, {seed}, {schedule}")]
            flags = [*growing, *chosen, *recorded]
            add(f"{schedule}, growing, {seed}", TWO_STAGES, start, flags, steps=6, without="--global-batch-size")

    # Megatron's own schedule with pairs, whose plans send to other ranks while their nodes run on the platform's streams.
    pairs = [*half, "--overlap-moe-expert-parallel-comm", *CHUNKS]
    add("megatron's own pairs, MTP, bf16", TWO_STAGES, MTP, begin, pairs, plugin=False, steps=2)

    # The reference has neither: splitting a layer leaves the numbers as they are.
    add("dualpipev, TP 2", TENSOR_PARALLEL, start, SCHEDULES["dualpipev"], steps=3)

    # Optimizer state written under one layout in a form that only fits it; refused under another.
    add("fitted", TWO_STAGES, SHARDED, SCHEDULES["dualpipev"], save_to("fitted", 2), steps=2, without=RESHARDABLE)
    load = ["--load", str(directory / "fitted")]
    add("fitted -> interleaved", TWO_STAGES, SHARDED, SCHEDULES["interleaved"], load, without=RESHARDABLE, may_fail=True)

    # The same with the layout in a file, which another layout overwrites before the checkpoint is read. In bf16: Megatron on its
    # own does not load this form of fp32 weights.
    path = str(directory / "overwritten.csv")
    tables = {"v": build("dualpipev", 2, 6), "looped": build("interleaved", 2, 6, vpp=2)}
    files = {name: {path: to_csv(table)} for name, table in tables.items()}
    half = [*SHARDED, "--bf16"]
    chosen = [*half, "--cf-schedule", path, "--num-virtual-stages-per-pipeline-rank", "2"]
    save, load = save_to("overwritten", 2), ["--load", str(directory / "overwritten"), "--ckpt-step", "2"]
    add("table.csv, fitted", TWO_STAGES, start, chosen, save, steps=2, without=RESHARDABLE, files=files["v"])
    flags = [*chosen, *load]
    add("table.csv, fitted -> overwritten", TWO_STAGES, flags, without=RESHARDABLE, files=files["looped"], may_fail=True)
    add("table.csv, fitted -> dualpipev", TWO_STAGES, half, SCHEDULES["dualpipev"], load, steps=3, without=RESHARDABLE)

    # Last, since it ends in the middle of a step: a learning rate that makes the second step's losses NaN.
    diverging = "--lr 1e30 --min-lr 1e30 --clip-grad 0 --lr-warmup-iters 0 --rerun-mode disabled".split()
    add("NaN", TWO_STAGES, start, SCHEDULES["dualpipev"], diverging, save_to("NaN", 1), steps=4, may_fail=True)
    return cases


def drop_flags(flags: list[str], dropped: tuple[str, ...]) -> list[str]:
    """Take flags with their values out of a command line."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word in dropped
        if not dropping:
            kept.append(word)
    return kept
