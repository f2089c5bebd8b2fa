"""What a page and a picture of a balance replay need: its figures, its sentences, and fewer numbers where there are many."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.replay import METHODS, Replay
from counterflow.errors import BalanceError
from counterflow.report.picture import write_number

METHOD_NAMES = {"fixed": "fixed homes", "eplb": "EPLB", "counterflow": "counterflow", "oracle": "oracle"}
MAX_RANKS = 2048
# The scale of loads over the mean: 0, 1/2, 1, one of these, and its square, which is the top. Even ratios above 1, so that
# 1.3 shows where the top is 9; what few ranks exceed for moments is drawn as the top.
ROOTS = (1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class Grouping:
    """Neighbouring micro-batches drawn as one: ``size`` each, the last group what is left of ``steps``."""

    steps: int
    size: int

    @property
    def starts(self) -> Array:
        """``int64[groups]``, where each begins."""
        return np.arange(0, self.steps, self.size)

    @property
    def sizes(self) -> Array:
        """``int64[groups]``."""
        return np.diff(np.append(self.starts, self.steps))

    def average(self, values: Array) -> Array:
        """Return ``float64[groups, ...]``, the mean of each group of ``[steps, ...]``."""
        sums = np.add.reduceat(values, self.starts, axis=0)
        return np.asarray(sums / self.sizes.reshape(-1, *[1] * (values.ndim - 1)))

    def find_lowest(self, values: Array) -> Array:
        """Return ``[groups, ...]``, the lowest of each group of ``[steps, ...]``."""
        return np.minimum.reduceat(values, self.starts, axis=0)


def group_steps(steps: int, most: int) -> Grouping:
    """Return groups of equal size, at most so many; one each where all fit."""
    return Grouping(steps, -(-steps // max(most, 1)))


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


def list_methods(replay: Replay) -> list[str]:
    """Return the methods that it has, in the order of `METHODS`."""
    return [name for name in METHODS if name in replay.balancedness]


def summarise_methods(replay: Replay) -> dict[str, tuple[float, float, float]]:
    """Return mean, 5th percentile and worst balancedness over micro-batches and layers, by method."""
    return {name: summarise(replay.balancedness[name]) for name in list_methods(replay)}


def summarise(values: Array) -> tuple[float, float, float]:
    """Return mean, 5th percentile and lowest."""
    return float(values.mean()), float(np.percentile(values, 5)), float(values.min())


def find_worst_layers(replay: Replay, most: int) -> list[int]:
    """Return the layers of least mean balancedness under fixed homes, the worst first, at most so many."""
    return find_lowest_layers(replay.balancedness["fixed"], most)


def find_lowest_layers(values: Array, most: int) -> list[int]:
    """Return the layers of least mean of ``[steps, layers]``, the least first, at most so many."""
    return [int(layer) for layer in np.argsort(values.mean(0), kind="stable")[:most]]


def weigh_loads(loads: Array, layer: int, grouping: Grouping) -> Array:
    """Return ``float64[groups, ranks]``: each rank's tokens over the mean rank's, of one layer of ``[steps, layers, ranks]``.

    Tokens of a group are summed first.
    """
    return divide_by_mean(np.add.reduceat(loads[:, layer], grouping.starts, axis=0))


def divide_by_mean(tokens: Array) -> Array:
    """Return tokens over their mean along the last axis; where there are none, all are equal: 1."""
    mean = tokens.mean(-1, keepdims=True)
    return np.divide(tokens, mean, out=np.ones(tokens.shape), where=mean > 0)


def choose_root(weighed: Array) -> float:
    """Return the root of the top of the scale of loads over the mean: all but one load in two hundred lie on it."""
    usual = float(np.percentile(weighed, 99.5))
    return next((root for root in ROOTS if root**2 >= usual), ROOTS[-1])


def place_loads(weighed: Array, root: float) -> Array:
    """Return places on the scale, from 0 to 4: 1 is half the mean, 2 the mean, 3 the root, 4 its square or more."""
    above = np.log(np.maximum(weighed, 1.0)) / np.log(root)
    return np.minimum(np.where(weighed <= 1, 2 * weighed, 2 + above), 4.0)


def list_marks(weighed: Array, root: float) -> list[str]:
    """Return the labels of places 0 to 4 on the scale."""
    marks = [write_number(load) for load in (0.0, 0.5, 1.0, root, root**2)]
    return [*marks[:4], ("≥ " if weighed.max() > root**2 else "") + marks[4]]


def choose_floor(lowest: float) -> float:
    """Return where the axis of balancedness begins: the tenth clearly below the lowest value, from 0 to 0.9."""
    return float(np.clip(np.floor(lowest * 10 - 0.2), 0, 9) / 10)


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


def describe_grouping(grouping: Grouping, units: str = "micro-batches") -> str:
    """Return in words what was lost by drawing groups; empty where nothing was."""
    if grouping.size == 1:
        return ""
    return (
        f"Down-sampled: {grouping.steps:,} {units} are drawn as {len(grouping.starts):,} groups of {grouping.size:,}. "
        "Lines are the mean of a group, the shade below them reaches down to its lowest; heat maps and bars are means."
    )


def write_count(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
