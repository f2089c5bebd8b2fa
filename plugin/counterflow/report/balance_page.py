"""The interactive page of a balance replay: balancedness, loads before and after, moves, of any number of micro-batches."""

import base64
from typing import Any

import numpy as np

from counterflow.balance.cluster import Array
from counterflow.balance.replay import Replay
from counterflow.report.balance_figures import (
    METHOD_NAMES,
    Grouping,
    check_replay,
    choose_floor,
    choose_root,
    describe_grouping,
    describe_moves,
    describe_size,
    find_worst_layers,
    group_steps,
    list_marks,
    list_methods,
    summarise_methods,
    weigh_loads,
    write_count,
)
from counterflow.report.filling import fill_page
from counterflow.report.picture import clean_text

# What bounds the page, at some 10 MB: numbers in both heat maps, groups of micro-batches, layers.
MAX_LOADS, MAX_GROUPS, MAX_LAYERS = 3_000_000, 400, 128
# With very many ranks, layers are left out before time gets coarser than this.
LEAST_GROUPS = 40


def render_replay_html(replay: Replay, title: str) -> str:
    """Return one self-contained page of a replay, its size bounded whatever the size of the replay.

    More than 400 micro-batches, or 3,000,000 loads, are drawn in groups, and more than 128 layers are left out but for those
    that fixed homes serve worst; the page says both. Its table counts everything. Raises `BalanceError` for a replay that cannot
    be drawn.
    """
    check_replay(replay)
    layers, grouping = _choose_detail(replay)
    data = encode_replay(replay, layers, grouping)
    return fill_page(
        "balance",
        data,
        title=clean_text(title),
        size=describe_size(replay),
        summary=[
            (METHOD_NAMES[name], *(f"{value:.4f}" for value in values)) for name, values in summarise_methods(replay).items()
        ],
        notes=list(filter(None, (_describe_layers(replay, layers), describe_grouping(grouping)))),
        methods=[(name, METHOD_NAMES[name]) for name in list_methods(replay)],
        grouped=grouping.size > 1,
        layers=[
            (layer, *(f"{replay.balancedness[name][:, layer].mean():.2f}" for name in ("fixed", "counterflow")))
            for layer in layers
        ],
        chosen=data["chosen"],
        marks=data["marks"],
        moves=describe_moves(replay),
        moved=bool(replay.moves.any()),
        far=bool(replay.off_node_moves.any()),
    )


def encode_replay(replay: Replay, layers: list[int], grouping: Grouping) -> dict[str, Any]:
    """Return what the page's script draws, in the order of ``layers``.

    ``means`` and ``lowest`` by method: packed ``[layers, groups]``; ``lowest`` is empty where a group is one micro-batch.
    ``loads`` of fixed homes and counterflow: packed ``[layers, groups, ranks]``, tokens over the mean. ``moves`` and ``far``: one
    number a group, clones per micro-batch over all layers, and those of them from another node.
    """
    values = {name: replay.balancedness[name][:, layers] for name in list_methods(replay)}
    loads = {
        name: np.stack([weigh_loads(tokens, layer, grouping) for layer in layers])
        for name, tokens in (("fixed", replay.fixed_loads), ("counterflow", replay.loads))
    }
    both = np.stack(list(loads.values()))
    root = choose_root(both)
    return {
        "first": replay.first,
        "steps": grouping.steps,
        "size": grouping.size,
        "groups": len(grouping.starts),
        "ranks": replay.cluster.ranks,
        "layers": layers,
        "chosen": layers.index(find_worst_layers(replay, 1)[0]),
        "names": {name: METHOD_NAMES[name] for name in values},
        "floor": choose_floor(min(float(each.min()) for each in values.values())),
        "root": root,
        "marks": list_marks(both, root),
        "means": {name: _pack(grouping.average(each).T) for name, each in values.items()},
        "lowest": {name: _pack(grouping.find_lowest(each).T) for name, each in values.items() if grouping.size > 1},
        "loads": {name: _pack(each) for name, each in loads.items()},
        "moves": _average_moves(replay.moves, grouping),
        "far": _average_moves(replay.off_node_moves, grouping),
    }


def _choose_detail(replay: Replay) -> tuple[list[int], Grouping]:
    """Return the layers to show, in order, and how micro-batches are grouped."""
    steps, layers, ranks = replay.fixed_loads.shape
    shown = min(layers, MAX_LAYERS, max(1, MAX_LOADS // (2 * ranks * min(steps, LEAST_GROUPS))))
    grouping = group_steps(steps, min(MAX_GROUPS, MAX_LOADS // (2 * ranks * shown)))
    return sorted(find_worst_layers(replay, shown)), grouping


def _describe_layers(replay: Replay, layers: list[int]) -> str:
    count = replay.fixed_loads.shape[1]
    if len(layers) == count:
        return ""
    return f"Shown: {write_count(len(layers), 'layer')} of {count:,}, those with the least balancedness under fixed homes."


def _pack(values: Array) -> dict[str, Any]:
    """Sixteen bits a number: finer than a pixel, and a third of the size of digits."""
    scale = max(float(values.max()), 1e-9) / 65535
    whole = np.round(values / scale).astype("<u2")
    return {"scale": scale, "bits": base64.b64encode(whole.tobytes()).decode()}


def _average_moves(moves: Array, grouping: Grouping) -> list[float]:
    return [round(float(count), 3) for count in grouping.average(moves.sum(1))]
