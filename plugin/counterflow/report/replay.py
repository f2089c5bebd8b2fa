"""A balance replay as a page and as a picture: balancedness, loads of ranks before and after, moves."""

from functools import partial

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.replay import METHODS, Replay
from counterflow.errors import BalanceError
from counterflow.report.balance_figures import (
    Balancing,
    Bars,
    Grouping,
    HeatMap,
    Series,
    divide_by_mean,
    scale_loads,
    write_count,
)
from counterflow.report.balance_page import render_page
from counterflow.report.balance_svg import render_picture

METHOD_NAMES = {"fixed": "fixed homes", "eplb": "EPLB", "counterflow": "counterflow", "oracle": "oracle"}
MAX_RANKS = 2048


def render_replay_html(replay: Replay, title: str) -> str:
    """Return one self-contained page of a replay, its size bounded whatever the size of the replay.

    More than 400 micro-batches, or 3,000,000 loads, are drawn in groups, and more than 128 layers are left out but for those
    that fixed homes serve worst; the page says both. Its table counts everything. Raises `BalanceError` for a replay that cannot
    be drawn.
    """
    return render_page(view_replay(replay), title)


def render_replay_svg(replay: Replay, title: str) -> str:
    """Return an SVG document, its size bounded whatever the size of the replay.

    It shows at most the 12 layers that fixed homes serve worst, the loads of the worst, and more than 360 micro-batches, or
    40,000 loads of a layer, in groups; it says so. Its table counts everything. Raises `BalanceError` for a replay that cannot
    be drawn.
    """
    return render_picture(view_replay(replay), title)


def view_replay(replay: Replay) -> Balancing:
    """Return what is drawn of a replay; raises `BalanceError` where it cannot be drawn."""
    check_replay(replay)
    steps, layers, ranks = replay.fixed_loads.shape
    far, moved = replay.off_node_moves.sum(1), describe_moves(replay)
    words = "clones sent per micro-batch" + (", within the node" if far.any() else "")
    series = [Series("moves", "up-F", "clones", words, replay.moves.sum(1))]
    if far.any():
        series.append(Series("far", "up-B", "of them from another node", "from another node", far))
    return Balancing(
        size=describe_size(replay),
        unit="micro-batch",
        units="micro-batches",
        row="rank",
        rows=ranks,
        where="under fixed homes",
        numbers=np.arange(replay.first, replay.first + steps),
        labels=np.arange(layers),
        names=METHOD_NAMES,
        scores={name: replay.balancedness[name] for name in METHODS if name in replay.balancedness},
        make_maps=partial(_make_maps, replay),
        heading="Moves, all layers",
        bars=[Bars("moves", "Clones sent before each micro-batch", moved, series, moved if replay.moves.any() else "")],
        table=[],
    )


def _make_maps(replay: Replay, layers: list[int], grouping: Grouping) -> list[HeatMap]:
    """Loads before and after, on one scale."""
    weighed = [weigh_loads(tokens, layers, grouping) for tokens in (replay.fixed_loads, replay.loads)]
    scale = scale_loads(np.stack(weighed))
    words = "tokens per rank over the mean rank's"
    return [
        HeatMap(name, f"{name}, {METHOD_NAMES[method]}: {words}", METHOD_NAMES[method], " × the mean", scale, values)
        for name, method, values in zip(("before", "after"), ("fixed", "counterflow"), weighed, strict=True)
    ]


def weigh_loads(loads: Array, layers: list[int], grouping: Grouping) -> Array:
    """Return ``float64[layers, groups, ranks]``: each rank's tokens over the mean rank's, of ``[steps, all layers, ranks]``.

    Tokens of a group are summed first.
    """
    return np.stack([divide_by_mean(np.add.reduceat(loads[:, layer], grouping.starts, axis=0)) for layer in layers])


def check_replay(replay: Replay) -> None:
    """Raise `BalanceError` for a replay that cannot be drawn: shapes that differ, nothing in it, values out of range."""
    shape = np.shape(replay.fixed_loads)
    if len(shape) != 3 or 0 in shape or shape[2] != replay.cluster.ranks or shape[2] > MAX_RANKS:
        raise BalanceError(
            f"replay with fixed loads of shape {list(shape)} for {replay.cluster.ranks} ranks; allowed: "
            f"[micro-batches, layers, ranks], none of them 0, at most {MAX_RANKS:,} ranks: give loads of the cluster's ranks"
        )
    unknown, missing = set(replay.balancedness) - set(METHODS), {"fixed", "counterflow"} - set(replay.balancedness)
    if unknown or missing:
        raise BalanceError(
            f"replay of methods {sorted(replay.balancedness)}; allowed: {', '.join(METHODS)}, fixed and counterflow among them"
        )
    for name, values in replay.balancedness.items():
        _check_values(f"balancedness of {name}", values, shape[:2], 1.0)
    _check_values("loads", replay.loads, shape, np.inf)
    _check_values("fixed loads", replay.fixed_loads, shape, np.inf)
    _check_values("moves", replay.moves, shape[:2], np.inf)
    _check_values("moves from another node", replay.off_node_moves, shape[:2], np.inf)
    if (replay.off_node_moves > replay.moves).any():
        raise BalanceError("replay with more moves from another node than moves; allowed: a part of them")


def _check_values(name: str, values: Array, shape: tuple[int, ...], highest: float) -> None:
    if np.shape(values) != shape:
        raise BalanceError(f"replay with {name} of shape {list(np.shape(values))}; allowed: {list(shape)}, as its fixed loads")
    least, most = values.min(), values.max()
    # A rounding error above 1 is none of the reader's; NaN fails here too.
    if not (least >= 0 and most <= highest + 1e-9 and np.isfinite(most)):
        bounds = "0 to 1" if highest == 1.0 else "finite numbers from 0 on"
        raise BalanceError(f"replay with {name} from {least} to {most}; allowed: {bounds}")


def describe_size(replay: Replay) -> str:
    """Return in words what was replayed."""
    steps, layers, ranks = replay.fixed_loads.shape
    which = f"micro-batch {replay.first}" if steps == 1 else f"micro-batches {replay.first} to {replay.first + steps - 1}"
    nodes = write_count(replay.cluster.nodes, "node")
    return f"{which} · {write_count(layers, 'layer')} · {write_count(ranks, 'rank')} on {nodes}"


def describe_moves(replay: Replay) -> str:
    """Return in words how many clones were sent, how often, and from where."""
    steps, layers = replay.moves.shape
    total, far = int(replay.moves.sum()), int(replay.off_node_moves.sum())
    over = f"{write_count(steps, 'micro-batch', 'micro-batches')} and {write_count(layers, 'layer')}"
    if not total:
        return f"No clone was sent in {over}."
    means = f"{total / steps:.3g} per micro-batch, {total / steps / layers:.3g} per micro-batch and layer"
    source = f"{far:,} from another node ({far / total:.1%})" if replay.cluster.nodes > 1 else "all within the one node"
    return f"{write_count(total, 'clone')} sent in {over}: {means}; {source}."
