"""Expert balancing on an emulated device: who trains how fast, beside a router that is forced to balance.

Each contestant trains the same small Megatron model on the same made-up loads; experts and links sleep (`device`). A layer's time
goes from the last rank's entry to the last rank's exit, forward and backward; a step's from the last rank's begin to the last
rank's end. Both are of the device's clock; a step's is of the wall's too. A share of force-balanced is the time with as many
tokens on every rank, without ``--cf-eplb``, over a contestant's.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.device import Speeds, cap_counts
from counterflow.arrays import Array
from counterflow.balance import Placement, make_cluster, make_workload, measure_balancedness, replay_trace, share_evenly
from counterflow.balance.costs import Costs
from counterflow.balance.kernels.deepseek import place_as_deepseek
from counterflow.balance.tiers import PLANS, STEP
from data import prepare_text
from tests.support.forked_ranks import fork_ranks
from tests.support.run_cases import Case
from tests.support.training import drop_flags, list_base_flags

RANKS, TOP_K, SHARED = 8, 6, 1
EXPERTS = 64
# Tokens of a micro-batch: those of the workload, and those that train, each of which stands for several.
TOKENS, TRAINED = 16384, 4096
HIDDEN, EXPERT_HIDDEN = 16, 8
TOKEN_BYTES = 7168 * 2
LEAST, LEAST_FORCED = 0.97, 0.99
CONTESTANTS = ("fixed", "loss-free", "EPLB", *PLANS)
MODEL = f"""
    --num-layers 1 --moe-layer-freq 1 --hidden-size {HIDDEN} --num-attention-heads 1 --ffn-hidden-size 32
    --moe-ffn-hidden-size {EXPERT_HIDDEN} --seq-length {TRAINED // RANKS} --max-position-embeddings {TRAINED // RANKS}
    --moe-router-topk {TOP_K} --expert-model-parallel-size {RANKS} --global-batch-size {RANKS * STEP} --bf16
    --eval-interval 1000 --eval-iters 0 --log-interval 1000 --lr 1e-5 --min-lr 1e-5
""".split()
DROPPED = (
    *("--moe-shared-expert-intermediate-size", "--moe-router-num-groups", "--moe-router-group-topk"),
    *("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate"),
)
# A router without a loss adds a bias to each expert's score and moves it by so much after every step; it has learned so long.
BIAS_RATE, BIAS_STEPS = 1e-3, 1000
SECONDS = 3600.0


@dataclass(frozen=True)
class Result:
    """What a contestant's training showed, of its scored micro-batches.

    Balancedness; seconds of the layers and of the steps by the device's clock; seconds of the steps by the wall's.
    """

    balancedness: Array
    layers: float
    steps: float
    wall: float


def measure_device(given: argparse.Namespace, directory: Path) -> float:
    """Print, for each kind of workload and contestant, balancedness and the share of force-balanced, in three modes."""
    steps, warmup = given.steps or 3, 6
    speeds = make_speeds(given.stretch, given.nodes)
    costs = directory / "costs.json"
    # A token that trains stands for several.
    costs.write_text(json.dumps({"token_time": speeds.token_time}))
    balanced = np.full(((warmup + steps) * STEP, 1, EXPERTS), TRAINED * TOP_K // EXPERTS)
    for seed in given.seeds:
        ideal = train("forced", balanced, [], speeds, warmup, directory / f"{seed}")
        print(
            f"seed {seed}: force-balanced, by the device's clock {1000 * ideal.layers / steps / STEP:.2f} ms a layer and "
            f"micro-batch, {1000 * ideal.steps / steps:.1f} ms a step; by the wall's {ideal.wall / steps:.2f} s a step, "
            f"stretched {speeds.stretch:g} times; asked: at least {LEAST} of it",
            flush=True,
        )
        for tried in (plan for plan in PLANS if plan in given.contestants):
            found = train(f"forced {tried}", balanced, list_flags(tried, costs), speeds, warmup, directory / f"{seed}")
            print(
                f"seed {seed}, force-balanced {tried:10} layer {ideal.layers / found.layers:.3f}, step "
                f"{ideal.steps / found.steps:.3f} of the run without --cf-eplb; asked: at least {LEAST_FORCED}",
                flush=True,
            )
        for kind in given.kinds:
            counts = make_workload(kind, (warmup + steps) * STEP, 1, EXPERTS, RANKS, TRAINED, TOP_K, seed % 2**16)
            for name, loads, flags, plan in list_contestants(cap_counts(counts, TRAINED), costs, given.contestants):
                planned = describe_plan(loads if plan is None else counts, plan, warmup, given.nodes)
                found = train(f"{kind} {name}", loads, flags, speeds, warmup, directory / f"{seed}")
                print(
                    f"seed {seed}, {kind:14} {name:10} balancedness {found.balancedness.mean():.4f}, 5th percentile "
                    f"{np.percentile(found.balancedness, 5):.4f}; of force-balanced: plan {planned}, layer "
                    f"{ideal.layers / found.layers:.3f}, step {ideal.steps / found.steps:.3f}, by the wall's clock "
                    f"{ideal.wall / found.wall:.3f}",
                    flush=True,
                )
    return 0.0


def make_speeds(stretch: float, nodes: int) -> Speeds:
    """Return the speeds of a DeepSeek-V3 expert on H100 nodes."""
    costs = Costs()
    return Speeds(
        token_time=costs.token_time * TOKENS / TRAINED,
        token_bytes=TOKEN_BYTES * TOKENS / TRAINED,
        expert_bytes=costs.expert_bytes,
        weights=3 * HIDDEN * EXPERT_HIDDEN,
        node_speed=costs.node_speed,
        network_speed=costs.network_speed,
        node_of_rank=tuple(rank * nodes // RANKS for rank in range(RANKS)),
        stretch=stretch,
    )


def list_contestants(counts: Array, costs: Path, names: list[str]) -> Iterator[tuple[str, Array, list[str], str | None]]:
    """Yield name, loads of what are experts to the trainer, flags, and the plan as which `replay_trace` knows it."""
    placed: dict[str, Callable[[Array], Array]] = {"fixed": np.copy, "loss-free": route_without_loss, "EPLB": place_by_eplb}
    for name in names:
        if name in placed:
            yield name, placed[name](counts), [], None
        else:
            yield name, counts, list_flags(name, costs), name


def list_flags(plan: str, costs: Path) -> list[str]:
    """Return the flags of a training under a plan."""
    return ["--cf-eplb", "--cf-eplb-plan", plan, *(["--cf-eplb-costs", str(costs)] if plan == "auto" else [])]


def place_by_eplb(counts: Array) -> Array:
    """Return the tokens of each slot under DeepSeek's plans: from the loads so far as a step begins, one slot more a rank.

    The moves themselves take no time here.
    """
    cluster = make_cluster(RANKS, EXPERTS + RANKS)
    rows = []
    for batch, seen in enumerate(counts):
        if batch % STEP == 0:
            past = counts[:batch].sum(0) if batch else np.ones_like(seen)
            experts, _, _ = place_as_deepseek(past, cluster.slots, 1, 1, RANKS)
            placement = Placement(cluster, experts)
        rows.append(round_rows(share_evenly(seen, placement)))
    return np.stack(rows)


def round_rows(shares: Array) -> Array:
    """Return whole numbers with the same sums over the last axis."""
    ends = np.rint(np.cumsum(shares, -1)).astype(np.int64)
    return np.diff(ends, prepend=0, axis=-1)


def route_without_loss(counts: Array) -> Array:
    """Return loads of the same tokens under a router with a bias for each expert, as DeepSeek-V3 has it.

    A token's score for an expert is the sigmoid of the logarithm of the expert's share and noise; the experts with the highest
    sums of score and bias get it. The biases have learned from the first step's shares before the first step.
    """
    random = np.random.default_rng(0)
    routed = np.empty_like(counts)
    for layer in range(counts.shape[1]):
        bias = np.zeros(counts.shape[2])
        for step in range(-BIAS_STEPS, len(counts) // STEP):
            batches = range(step * STEP, (step + 1) * STEP) if step >= 0 else [-1]
            total = np.zeros(counts.shape[2])
            for batch in batches:
                shares = counts[batch, layer] if batch >= 0 else counts[:STEP, layer].sum(0)
                tokens = TRAINED if batch >= 0 else TRAINED // 8
                scores = np.log(np.maximum(shares / shares.sum(), 1e-6)) + random.gumbel(size=(tokens, len(shares)))
                best = np.argpartition(1 / (1 + np.exp(-scores)) + bias, -TOP_K, 1)[:, -TOP_K:]
                drawn = np.bincount(best.ravel(), minlength=len(shares))
                total += drawn
                if batch >= 0:
                    routed[batch, layer] = drawn
            bias += BIAS_RATE * np.sign(total.mean() - total)
    return routed


def describe_plan(counts: Array, plan: str | None, warmup: int, nodes: int) -> str:
    """Return the share of force-balanced that a plan has by the cost model alone; without one, loads are placed already."""
    if plan is None:
        loads = counts.reshape(len(counts), 1, RANKS, -1).sum(-1)[warmup * STEP :]
        return f"{(loads.mean(2) / loads.max(2)).mean():.3f}"
    done = replay_trace(counts * (TOKENS // TRAINED), RANKS, 1, STEP, nodes, warmup * STEP, plan, shared=SHARED)
    assert done.account is not None
    return f"{done.account.share_of_ideal('counterflow'):.3f}"


def train(name: str, loads: Array, flags: list[str], speeds: Speeds, warmup: int, directory: Path) -> Result:
    """Train on the device and return what was seen behind the warm-up."""
    folder = directory / name.replace(" ", "-")
    folder.mkdir(parents=True)
    np.save(folder / "counts.npy", loads)
    steps = len(loads) // STEP
    text = prepare_text(directory.parent / "text", max_bytes=2**21)
    whole = drop_flags([*list_base_flags(text, directory), *MODEL], *DROPPED)
    case: Case = {
        "name": name,
        "plugin": bool(flags),
        "flags": [*whole, "--num-experts", str(loads.shape[2]), "--train-iters", str(steps), *flags],
        "counts": str(folder / "counts.npy"),
        "tokens": TRAINED,
        "speeds": asdict(speeds),
        "warmup": warmup,
    }
    job = {"case": case, "results": str(folder / "result.json")}
    statuses = fork_ranks("device_worker", job, RANKS, folder / "logs", timeout=SECONDS)
    if any(statuses):
        bad = next(rank for rank, status in enumerate(statuses) if status)
        raise SystemExit(f"{name}: rank {bad} ended badly: {(folder / 'logs' / str(bad) / 'stderr.log').read_text()[-3000:]}")
    ranks = json.loads((folder / "result.json").read_text())["ranks"]
    notes, times = (np.array([rank[key] for rank in ranks]) for key in ("notes", "times"))
    first = warmup * STEP * loads.shape[1]
    notes, times = notes[:, first:], times[:, warmup:]
    layers = sum(float((notes[:, :, end].max(0) - notes[:, :, end - 1].max(0)).sum()) for end in (1, 3))
    wall, steps_spent = (float((times[:, :, end].max(0) - times[:, :, end - 1].max(0)).sum()) for end in (1, 3))
    return Result(measure_balancedness(notes[:, :, 4].T), layers, steps_spent, wall)
