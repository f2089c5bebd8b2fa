"""``counterflow balance``: plan where experts go, replay recorded routing, make loads to replay, show what a run recorded."""

import argparse
import io
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.cluster import MAX_SLOTS, make_cluster
from counterflow.balance.costs import BOUNDS, Costs
from counterflow.balance.files.loads import read_loads, read_trace
from counterflow.balance.files.recorded import RecordedBalance, read_record
from counterflow.balance.files.serving import MAX_FIRST_LAYER, render_sglang, render_vllm
from counterflow.balance.loads import LARGEST_LOAD
from counterflow.balance.placement import count_copies, divide_loads, measure_balancedness
from counterflow.balance.tiers import PLANS, STEP
from counterflow.balance.workloads import WORKLOADS, make_workload
from counterflow.commands.arguments import add_outputs, check_outputs, number, print_table, whole, write_outputs
from counterflow.errors import OptionError
from counterflow.report.files import check_output, write_output

if TYPE_CHECKING:
    from counterflow.balance.planning import Plan
    from counterflow.balance.replay import Replay

FORMATS = ("json", "sglang", "vllm")
# Options of `Costs`: the field, its unit, and what it is.
COST_OPTIONS = {
    "expert-megabytes": ("expert_bytes", 1e6, "megabytes of an expert's weights, of two bytes each"),
    "token-time": ("token_time", 1e-6, "microseconds of an expert's forward and backward for a token"),
    "clone-time": ("clone_time", 1e-6, "microseconds that a clone holds up its rank in a micro-batch, whatever its tokens"),
    "node-speed": ("node_speed", 1e9, "gigabytes a second that a rank receives from its own node"),
    "network-speed": ("network_speed", 1e9, "gigabytes a second that a rank receives from another node"),
    "exposed": ("exposed", 1.0, "share of a transfer's time that computation does not hide"),
}
# Of more layers than this, the worst are printed.
SHOWN_LAYERS = 16
WORST_LAYERS = 5


def add_balance_commands(commands: Any) -> None:
    """Add ``balance plan``, ``replay``, ``workload`` and ``show`` to the command's parser."""
    balance = commands.add_parser(
        "balance", help="plan where experts and their copies go, replay recorded or made-up routing, show a record"
    )
    kinds = balance.add_subparsers(required=True, metavar="COMMAND")
    plan = kinds.add_parser("plan", help="place experts and their copies for these loads")
    plan.add_argument(
        "loads", type=Path, metavar="LOADS", help="[layers, experts] in .npy, .npz, .csv or .json; a trace is summed"
    )
    count = whole(1, MAX_SLOTS)
    plan.add_argument("--slots", type=count, required=True, metavar="S", help="slots of all ranks together")
    plan.add_argument("--groups", type=count, default=1, metavar="G", help="groups of experts to keep on one node (default: 1)")
    plan.add_argument(
        "--policy", default="auto", metavar="P", help="auto, hierarchical, global, spill or deepseek (default: auto)"
    )
    plan.add_argument(
        "--traffic-weight",
        type=number(0, LARGEST_LOAD),
        metavar="X",
        help="what load computed off its group's node costs, beside the slowest rank's",
    )
    plan.set_defaults(run=run_plan)
    _add_plan_outputs(plan)
    replay = kinds.add_parser("replay", help="plan from the past of a trace, score on what follows")
    replay.add_argument(
        "trace",
        type=Path,
        metavar="TRACE",
        help="counts[micro-batches, layers, experts] in .npz or .npy, or a folder that --cf-record wrote",
    )
    replay.add_argument(
        "--clones-per-rank",
        type=whole(0, MAX_SLOTS),
        default=1,
        metavar="C",
        help="spare slots per rank, beside its homes (default: 1)",
    )
    replay.add_argument(
        "--interval", type=whole(1), default=1, metavar="N", help="micro-batches from one plan to the next (default: 1)"
    )
    replay.add_argument(
        "--warmup",
        type=whole(1),
        metavar="N",
        help="micro-batches before the first scored (default: 50, or half of a short trace)",
    )
    _add_replay_plan(replay)
    replay.add_argument("--key", default="counts", metavar="NAME", help="the trace's array in an .npz (default: counts)")
    replay.set_defaults(run=run_replay)
    _add_workload(kinds)
    show = kinds.add_parser("show", help="show how a training run's experts were balanced")
    show.add_argument("record", type=Path, metavar="DIR", help="folder that a run with --cf-eplb --cf-record DIR wrote")
    show.set_defaults(run=run_show)
    for parser in (replay, show):
        add_outputs(parser, "html", "svg")
    for parser in (plan, replay):
        parser.add_argument("--ranks", type=count, required=True, metavar="R", help="expert-parallel ranks")
        parser.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes that the ranks are on (default: 1)")


def _add_replay_plan(replay: argparse.ArgumentParser) -> None:
    replay.add_argument(
        "--plan",
        choices=PLANS,
        default="predicted",
        help="resident clones planned from past loads; just-in-time clones from each micro-batch's own counts; or both, each "
        "clone only where it saves more time than it costs (default: predicted)",
    )
    replay.add_argument(
        "--rehome", choices=("auto", "never"), help="whether homes move where that pays (default: auto, but never if predicted)"
    )
    replay.add_argument("--step", type=whole(1), default=STEP, metavar="N", help=f"micro-batches of a step (default: {STEP})")
    replay.add_argument(
        "--shared-slots",
        type=whole(0, MAX_SLOTS),
        metavar="N",
        help="slots per rank for just-in-time clones, which all layers share, under --plan exact or auto (default: 1)",
    )
    group = replay.add_argument_group("costs, by default those of a DeepSeek-V3 expert on H100 nodes")
    for name, (field, unit, what) in COST_OPTIONS.items():
        default = getattr(Costs(), field) / unit
        _, least, most = BOUNDS[field]
        within = number(least / unit, most / unit)
        group.add_argument(f"--{name}", type=within, default=default, metavar="X", help=f"{what} (default: {default:g})")


def _add_workload(kinds: Any) -> None:
    parser = kinds.add_parser("workload", help="make a trace of a kind that imbalance is measured with")
    parser.add_argument(
        "kind", metavar="KIND", help="; ".join(f"{kind}: {what}" for kind, what in WORKLOADS.items()).replace("%", "%%")
    )
    sizes = {
        "microbatches": (160, "micro-batches; 8 make a step"),
        "layers": (2, "layers"),
        "experts": (64, "experts of a layer"),
        "ranks": (8, "ranks on which they lie in order"),
        "tokens": (16384, "tokens of a micro-batch"),
        "top-k": (6, "experts that each token goes to"),
    }
    for name, (size, what) in sizes.items():
        parser.add_argument(f"--{name}", type=whole(1), default=size, metavar="N", help=f"{what} (default: {size})")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the random numbers (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace, .npz, that replay reads")
    parser.set_defaults(run=run_workload)


def _add_plan_outputs(parser: argparse.ArgumentParser) -> None:
    group = add_outputs(parser, "out")
    group.add_argument(
        "--format", choices=FORMATS, help="of --out: counterflow's own, or what that server reads (default: json, its own)"
    )
    group.add_argument(
        "--first-layer",
        type=whole(0, MAX_FIRST_LAYER),
        metavar="N",
        help="layers of the model before the first with experts; SGLang counts them",
    )


def run_plan(args: argparse.Namespace) -> int:
    """Plan, print how good the plan is, and write it where that is asked for."""
    _check_plan_outputs(args)
    loads = read_loads(args.loads)
    cluster = make_cluster(args.ranks, args.slots, args.nodes)
    from counterflow.balance.kernels.packing import place_layer  # loads a compiler
    from counterflow.balance.planning import plan_placement

    _announce_compiling(place_layer)
    weight = {} if args.traffic_weight is None else {"traffic_weight": args.traffic_weight}
    plan = plan_placement(loads, cluster, args.groups, args.policy, **weight)
    write_outputs(args, {"out": lambda: _render_plan(plan, args)})
    figures = describe_plan(plan, loads)
    if args.json:
        print(json.dumps({"policy": args.policy, **figures}, indent=2))
    else:
        _print_plan(figures)
        if args.out is not None:
            print(_say_how_to_use(args, cluster.slots - loads.shape[1]))
    return 0


def run_replay(args: argparse.Namespace) -> int:
    """Replay a trace, print how balanced each method kept it and what that took, and write the pictures asked for."""
    check_outputs(args)
    if args.shared_slots is not None and args.plan == "predicted":
        raise OptionError(
            f"--shared-slots {args.shared_slots} is for just-in-time clones, which --plan predicted has not: "
            "give --plan exact or auto, or drop --shared-slots"
        )
    shared = 1 if args.shared_slots is None else args.shared_slots
    costs = Costs(**{field: getattr(args, name.replace("-", "_")) * unit for name, (field, unit, _) in COST_OPTIONS.items()})
    counts = read_trace(args.trace, args.key)
    from counterflow.balance.kernels.cloning import plan_layer  # loads a compiler
    from counterflow.balance.replay import replay_trace

    _announce_compiling(plan_layer)
    rehome = None if args.rehome is None else args.rehome == "auto"
    chosen = (args.plan, rehome, args.step, shared, costs)
    done = replay_trace(counts, args.ranks, args.clones_per_rank, args.interval, args.nodes, args.warmup, *chosen)
    from counterflow.report import render_replay_html, render_replay_svg

    title = args.trace.resolve().name
    write_outputs(args, {"html": lambda: render_replay_html(done, title), "svg": lambda: render_replay_svg(done, title)})
    figures = describe_replay(done)
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        _print_replay(done, figures)
    return 0


def run_workload(args: argparse.Namespace) -> int:
    """Make a trace of made-up routing and write it."""
    if args.out.suffix != ".npz":
        raise OptionError(f"--out {args.out}; allowed: a name that ends in .npz")
    check_output("--out", args.out)
    sizes = (args.microbatches, args.layers, args.experts, args.ranks, args.tokens, args.top_k)
    counts = make_workload(args.kind, *sizes, args.seed)
    file = io.BytesIO()
    np.savez_compressed(file, counts=counts.astype(np.int32))
    write_output("--out", args.out, file.getvalue())
    batches, layers, experts = counts.shape
    print(f"{args.kind}: {batches} micro-batches, {layers} layers, {experts} experts, seed {args.seed}; written to {args.out}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print how balanced a recorded run was and what that cost, and draw it where that is asked for."""
    check_outputs(args)
    record = read_record(args.record)
    from counterflow.report import render_record_html, render_record_svg

    title = args.record.resolve().name
    write_outputs(args, {"html": lambda: render_record_html(record, title), "svg": lambda: render_record_svg(record, title)})
    figures = describe_record(record)
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        _print_record(record, figures)
    return 0


def _announce_compiling(function: Any) -> None:
    """Say why the first run takes long, to who looks on."""
    from counterflow.compiling import is_compiled

    if sys.stderr.isatty() and not is_compiled(function):
        print("compiling, once per installation: up to a minute", file=sys.stderr)


def describe_plan(plan: "Plan", loads: Array) -> dict[str, Any]:
    """Return a plan's figures, as ``--json`` prints them; ``layers`` has one object per layer.

    ``before`` is the balancedness of contiguous homes without copies, ``after`` the plan's, ``bound`` the best that any plan
    could have, ``gap`` by how much the plan's slowest rank is above that; ``off_node`` is a share of the layer's load.
    """
    cluster, copies = plan.placement.cluster, count_copies(plan.placement, loads.shape[1])
    columns = {
        "before": measure_balancedness(_sum_contiguous(loads, cluster.ranks)),
        "after": measure_balancedness(plan.rank_loads),
        "bound": plan.best_balancedness,
        "gap": divide_loads(plan.rank_loads.max(1), plan.bound) - 1,
        "replicated": (copies > 1).sum(1),
        "most_copies": copies.max(1),
    }
    if cluster.nodes > 1:
        columns["off_node"] = plan.off_node / np.where(loads.any(1), loads.sum(1), 1.0)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(column.tolist() for column in columns.values()), strict=True)]
    worst = {"before": min, "after": min, "bound": min}
    return {
        "experts": loads.shape[1],
        "slots": cluster.slots,
        "ranks": cluster.ranks,
        "nodes": cluster.nodes,
        "mean": {name: float(column.mean()) for name, column in columns.items()},
        "worst": {name: worst.get(name, max)(column.tolist()) for name, column in columns.items()},
        "layers": rows,
    }


def describe_replay(replay: "Replay") -> dict[str, Any]:
    """Return figures per method over micro-batches and layers, as ``--json`` prints them.

    Balancedness: mean, 5th percentile and worst; ``max_over_mean`` is the mean of its inverse. ``force_balanced`` is the time
    with as many tokens on every rank over the method's time. Counterflow also has the experts that moved and, for each tier, how
    many were sent and their bytes, within nodes and between nodes.
    """
    figures: dict[str, Any] = {}
    for method, scores in replay.balancedness.items():
        row = {"mean": float(scores.mean()), "p5": float(np.percentile(scores, 5)), "worst": float(scores.min())}
        figures[method] = row | {"max_over_mean": float((1 / scores).mean())}
    figures["counterflow"] |= {"moves": int(replay.moves.sum()), "off_node_moves": int(replay.off_node_moves.sum())}
    if (account := replay.account) is None:
        return figures
    for method in replay.balancedness:
        figures[method]["force_balanced"] = account.share_of_ideal(method)
    sums = account.sum_bytes()
    tiers = {
        tier: {"near": int(count[..., 0].sum()), "far": int(count[..., 1].sum())}
        | {"near_bytes": float(sums[tier][0]), "far_bytes": float(sums[tier][1])}
        for tier, count in account.sent.items()
    }
    tiers["homes"] |= {"early_near": int(account.early[0]), "early_far": int(account.early[1])}
    figures["counterflow"] |= {"plan": account.plan, "bytes": float(sum(row.sum() for row in sums.values())), "tiers": tiers}
    return figures


def describe_record(record: RecordedBalance) -> dict[str, Any]:
    """Return a record's figures, as ``--json`` prints them; ``layers`` has one object per layer.

    ``before`` is the mean balancedness of homes alone over steps, ``after`` that with clones, the worst steps beside them;
    ``per_step`` are what was sent and how long that took, of all layers, as mean, most and sum over steps.
    """
    columns = {
        "layer": record.layers,
        "before": record.before.mean(0),
        "after": record.after.mean(0),
        "worst_before": record.before.min(0),
        "worst_after": record.after.min(0),
    }
    lists = [column.tolist() for column in columns.values()]
    cluster = record.find_placement(-1).cluster
    return {
        "steps": len(record.steps),
        "first_step": int(record.steps[0]),
        "last_step": int(record.steps[-1]),
        "microbatches": int(record.microbatches.sum()),
        "experts": record.experts,
        "slots": cluster.slots,
        "ranks": cluster.ranks,
        "mean": {"before": float(record.before.mean()), "after": float(record.after.mean())},
        "worst": {"before": float(record.before.min()), "after": float(record.after.min())},
        "per_step": {
            name: {"mean": float(values.mean()), "most": float(values.max()), "sum": float(values.sum())}
            for name, values in record.figures.items()
        },
        "layers": [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)],
    }


def _sum_contiguous(loads: Array, ranks: int) -> Array:
    """Return ``float64[layers, ranks]``: experts in order, as many on each rank, one more on some where that does not divide."""
    summed = np.zeros((loads.shape[0], ranks))
    np.add.at(summed.T, np.arange(loads.shape[1]) * ranks // loads.shape[1], loads.T)
    return summed


def _check_plan_outputs(args: argparse.Namespace) -> None:
    """Before any work: the file can be written, and read by whom it is for."""
    if args.out is None and args.format is not None:
        raise OptionError(f"--format {args.format} given without a file to write; add --out FILE")
    if args.first_layer is not None and args.format != "sglang":
        raise OptionError(f"--first-layer {args.first_layer} is of --format sglang alone; drop it, or write that format")
    if args.out is None:
        return
    check_outputs(args)
    allowed = (".json",) if args.format in ("sglang", "vllm") else (".json", ".npz")
    if args.out.suffix not in allowed:
        raise OptionError(
            f"--out {args.out} with --format {args.format or 'json'}; allowed: a name that ends in {' or '.join(allowed)}"
        )


def _render_plan(plan: "Plan", args: argparse.Namespace) -> str | bytes:
    if args.format == "sglang":
        return render_sglang(plan.placement, args.first_layer or 0)
    if args.format == "vllm":
        return render_vllm(plan.placement)
    cluster, experts = plan.placement.cluster, plan.placement.experts
    ranks: dict[str, Any] = {"slots_per_rank": cluster.slots_per_rank, "node_of_rank": cluster.node_of_rank}
    layers: dict[str, Any] = {
        "experts": experts,
        "balancedness": measure_balancedness(plan.rank_loads),
        "bound": plan.best_balancedness,
    }
    if args.out.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, **ranks, **layers)
        return file.getvalue()
    return json.dumps({"cluster": ranks, **{name: values.tolist() for name, values in layers.items()}}) + "\n"


def _say_how_to_use(args: argparse.Namespace, clones: int) -> str:
    if args.format == "sglang":
        file = shlex.quote(str(args.out))
        return f"SGLang: --init-expert-location {file} --ep-num-redundant-experts {clones} --ep-size {args.ranks}"
    if args.format == "vllm":
        config = shlex.quote(json.dumps({"eplb_config": {"expert_map_path": str(args.out)}}))
        return f"vLLM-Ascend: --enable-expert-parallel --additional-config {config} on {args.ranks} expert-parallel ranks"
    return f"placement written to {args.out}"


def _print_plan(figures: dict[str, Any]) -> None:
    layers = list(enumerate(figures["layers"]))
    shown = layers
    if len(layers) > SHOWN_LAYERS:
        shown = sorted(layers, key=lambda layer: float(layer[1]["after"]))[:WORST_LAYERS]
    sizes = ", ".join(f"{figures[name]} {name}" for name in ("experts", "slots", "ranks", "nodes"))
    headings = {"before": "before", "after": "after", "bound": "at best", "gap": "gap"}
    headings |= {"replicated": "replicated", "most_copies": "most copies", "off_node": "off node"}
    columns = [name for name in headings if name in figures["mean"]]
    rows = [(f"layer {layer}", row) for layer, row in shown]
    rows += [("mean", figures["mean"]), ("worst", figures["worst"])] if len(layers) > 1 else []
    print(f"{len(layers)} layers, {sizes}; balancedness is mean over slowest rank")
    if len(shown) < len(layers):
        print(f"the {len(shown)} least balanced layers:")
    cells = [[name, *(_write_figure(column, row[column]) for column in columns)] for name, row in rows]
    print_table(["", *(headings[name] for name in columns)], cells)


def _write_figure(name: str, value: float) -> str:
    if name in ("gap", "off_node"):
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" if name in ("replicated", "most_copies") else f"{value:.4f}"


def _print_replay(replay: "Replay", figures: dict[str, Any]) -> None:
    batches, layers = replay.moves.shape
    cluster = replay.cluster
    print(
        f"micro-batches {replay.first} to {replay.first + batches - 1}, {layers} layers, {cluster.ranks} ranks, "
        f"{cluster.slots} slots, {cluster.nodes} nodes; balancedness is mean over slowest rank"
    )
    names = ("mean", "p5", "worst", "max_over_mean", "force_balanced")
    rows = [
        [
            method,
            *(f"{row[name]:.4f}" for name in names if name in row),
            *(f"{row[name]}" if name in row else "" for name in ("moves", "off_node_moves")),
        ]
        for method, row in figures.items()
    ]
    shown = [name.replace("_", " ").replace("max over mean", "max/mean") for name in names if name in figures["fixed"]]
    print_table(["", *shown, "moves", "off node"], rows)
    ours = figures["counterflow"]
    if "tiers" in ours:
        print(f"plan {ours['plan']}, in all layers and scored micro-batches:")
        tiers = [
            [
                tier.replace("_", "-"),
                f"{row['near']}",
                f"{row['near_bytes'] / 1e9:.2f}",
                f"{row['far']}",
                f"{row['far_bytes'] / 1e9:.2f}",
            ]
            for tier, row in ours["tiers"].items()
        ]
        print_table(["sent", "in node", "GB", "across", "GB"], tiers)
        if early := ours["tiers"]["homes"]["early_near"] + ours["tiers"]["homes"]["early_far"]:
            print(f"{early} homes moved before the first scored micro-batch")


def _print_record(record: RecordedBalance, figures: dict[str, Any]) -> None:
    from counterflow.report.record import describe_run, list_transfers

    shown = figures["layers"]
    print(f"{describe_run(record)}; balancedness is mean over slowest rank")
    if len(shown) > SHOWN_LAYERS:
        shown = sorted(shown, key=lambda layer: float(layer["before"]))[:WORST_LAYERS]
        print(f"the {len(shown)} layers of {len(figures['layers'])} that are least balanced on homes alone:")
    names = ("before", "after", "worst_before", "worst_after")
    rows = [[f"layer {layer['layer']}", *(f"{layer[name]:.4f}" for name in names)] for layer in shown]
    every = [figures[kind][name] for kind in ("mean", "worst") for name in ("before", "after")]
    rows.append(["all layers", *(f"{value:.4f}" for value in every)])
    print_table(["", "before", "after", "worst before", "worst after"], rows)
    print_table(["of each step", "mean", "most", "in all"], [list(row) for row in list_transfers(record)])
