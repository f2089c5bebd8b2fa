"""The interactive page of a balance replay: balancedness, loads before and after, moves, of any number of micro-batches."""

import base64
from typing import Any

import numpy as np

from counterflow.arrays import Array
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
    moves = describe_moves(replay)
    return fill_page(
        "balance",
        "plots",
        data,
        title=clean_text(title),
        size=describe_size(replay),
        counted="The table counts every micro-batch and layer.",
        summary=[
            (METHOD_NAMES[name], *(f"{value:.4f}" for value in values)) for name, values in summarise_methods(replay).items()
        ],
        notes=list(filter(None, (_describe_layers(replay, layers), describe_grouping(grouping)))),
        units="micro-batches",
        methods=[(name, METHOD_NAMES[name]) for name in list_methods(replay)],
        grouped=grouping.size > 1,
        layers=[
            (layer, *(f"{replay.balancedness[name][:, layer].mean():.2f}" for name in ("fixed", "counterflow")))
            for layer in layers
        ],
        beside="under fixed homes and under counterflow",
        worst="fixed homes serve worst",
        chosen=data["chosen"],
        marks=[(25 * place, label) for place, label in enumerate(data["marks"])],
        moves=moves,
        moved=bool(replay.moves.any()),
        far=bool(replay.off_node_moves.any()),
    )


def encode_replay(replay: Replay, layers: list[int], grouping: Grouping) -> dict[str, Any]:
    """Return what the page's script draws, in the order of ``layers``.

    Besides what `encode_lines` returns, ``maps``: tokens over the mean rank's, before and after; ``bars``: clones per micro-batch
    over all layers, and those of them from another node.
    """
    values = {name: replay.balancedness[name][:, layers] for name in list_methods(replay)}
    loads = [
        np.stack([weigh_loads(tokens, layer, grouping) for layer in layers]) for tokens in (replay.fixed_loads, replay.loads)
    ]
    both = np.stack(loads)
    root = choose_root(both)
    per = "clones per micro-batch" if grouping.size > 1 else "clones"
    moves = [(replay.moves, "up-F", per), (replay.off_node_moves, "up-B", "of them from another node")]
    return {
        **encode_lines(np.arange(replay.first, replay.first + grouping.steps), values, METHOD_NAMES, grouping),
        "unit": "micro-batch",
        "units": "micro-batches",
        "row": "rank",
        "rows": replay.cluster.ranks,
        "layers": layers,
        "chosen": layers.index(find_worst_layers(replay, 1)[0]),
        "marks": list_marks(both, root),
        "maps": [
            {"name": place, "words": METHOD_NAMES[name], "scale": "loads", "root": root, "values": pack_numbers(each)}
            for place, name, each in zip(("before", "after"), ("fixed", "counterflow"), loads, strict=True)
        ],
        "bars": [
            {
                "name": "moves",
                "series": [
                    encode_series(grouping.average(counts.sum(1)), words, colour)
                    for counts, colour, words in moves
                    if colour == "up-F" or counts.any()
                ],
            }
        ],
    }


def encode_lines(numbers: Array, values: dict[str, Array], names: dict[str, str], grouping: Grouping) -> dict[str, Any]:
    """Return the axis of time and the lines: ``numbers[steps]`` label the axis, ``values`` are ``[steps, layers]`` by method.

    ``means`` and ``lowest`` are packed ``[layers, groups]``; ``lowest`` is empty where a group is one step.
    """
    ends = grouping.starts + grouping.sizes
    return {
        "firsts": numbers[grouping.starts].tolist(),
        "lasts": numbers[ends - 1].tolist(),
        "steps": grouping.steps,
        "size": grouping.size,
        "groups": len(grouping.starts),
        "names": {name: names[name] for name in values},
        "floor": choose_floor(min(float(each.min()) for each in values.values())),
        "means": {name: pack_numbers(grouping.average(each).T) for name, each in values.items()},
        "lowest": {name: pack_numbers(grouping.find_lowest(each).T) for name, each in values.items() if grouping.size > 1},
    }


def encode_series(values: Array, words: str, colour: str = "") -> dict[str, Any]:
    """Return bars of a colour, or what without one only the tooltip says: a number a group, and its words."""
    return {"values": [round(float(value), 3) for value in values], "words": words, "colour": colour}


def _choose_detail(replay: Replay) -> tuple[list[int], Grouping]:
    """Return the layers to show, in order, and how micro-batches are grouped."""
    steps, layers, ranks = replay.fixed_loads.shape
    shown, grouping = choose_detail(steps, layers, ranks)
    return sorted(find_worst_layers(replay, shown)), grouping


def choose_detail(steps: int, layers: int, rows: int) -> tuple[int, Grouping]:
    """Return how many layers a page of two heat maps of so many rows shows, and how steps are grouped."""
    shown = min(layers, MAX_LAYERS, max(1, MAX_LOADS // (2 * rows * min(steps, LEAST_GROUPS))))
    return shown, group_steps(steps, min(MAX_GROUPS, MAX_LOADS // (2 * rows * shown)))


def _describe_layers(replay: Replay, layers: list[int]) -> str:
    count = replay.fixed_loads.shape[1]
    if len(layers) == count:
        return ""
    return f"Shown: {write_count(len(layers), 'layer')} of {count:,}, those with the least balancedness under fixed homes."


def pack_numbers(values: Array) -> dict[str, Any]:
    """Sixteen bits a number: finer than a pixel, and a third of the size of digits."""
    scale = max(float(values.max()), 1e-9) / 65535
    whole = np.round(values / scale).astype("<u2")
    return {"scale": scale, "bits": base64.b64encode(whole.tobytes()).decode()}
