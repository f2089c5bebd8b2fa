"""What pages and pictures of balancing are drawn from: a replay's or a recorded run's figures, its scales, its sentences."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.report.colours import mix_shades
from counterflow.report.picture import write_number

# The scale of loads over the mean: 0, 1/2, 1, one of these, and its square, which is the top. Even ratios above 1, so that
# 1.3 shows where the top is 9; what few exceed for moments is drawn as the top.
ROOTS = (1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
# Steps between the colours of a scale: the eye tells no more apart.
SHADES = 256


@dataclass(frozen=True)
class Grouping:
    """Neighbouring micro-batches or steps drawn as one: ``size`` each, the last group what is left of ``steps``."""

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


@dataclass(frozen=True)
class Scale:
    """The colours of a heat map, `SHADES` + 1 evenly from the first of ``shades`` (names of colours) to the last.

    ``edges[SHADES]`` are the values at which the next colour begins; ``marks`` are places in per cent and their labels.
    """

    edges: Array
    shades: tuple[str, ...]
    marks: list[tuple[float, str]]
    words: str

    def place(self, values: Array) -> Array:
        """Return which colour each value has."""
        return np.searchsorted(self.edges, values, side="right")

    def list_colours(self, theme: dict[str, str]) -> list[str]:
        """Return all the colours."""
        return [mix_shades(n / SHADES, [theme[shade] for shade in self.shades]) for n in range(SHADES + 1)]


# Where on a scale, from 0 to 1, one colour ends and the next begins.
BETWEEN = (np.arange(SHADES) + 0.5) / SHADES


def scale_loads(weighed: Array) -> Scale:
    """Return the scale of loads over the mean; all but one load in two hundred lie on it."""
    usual = float(np.percentile(weighed, 99.5))
    root = next((root for root in ROOTS if root**2 >= usual), ROOTS[-1])
    marks = [write_number(load) for load in (0.0, 0.5, 1.0, root, root**2)]
    marks[4] = ("≥ " if weighed.max() > root**2 else "") + marks[4]
    edges = np.where(BETWEEN <= 0.5, 2 * BETWEEN, root ** (4 * BETWEEN - 2))
    shades = tuple(f"load-{shade}" for shade in range(5))
    return Scale(edges, shades, [(25.0 * n, mark) for n, mark in enumerate(marks)], "blue is less than the mean, orange more")


def scale_clones(most: float) -> Scale:
    """Return the scale of clones: even in doublings of copies, marked at 0, 1, 3, 7 and so on, and the most."""
    doublings = [2.0**n - 1 for n in range(12) if (2.0**n - 1) < 0.6 * most]
    marks = [(100 * float(np.log2(1 + n) / np.log2(1 + most)), write_number(round(n, 2))) for n in (*doublings, most)]
    return Scale((1 + most) ** BETWEEN - 1, ("load-2", "activations"), marks, "the greener, the more clones")


@dataclass(frozen=True)
class HeatMap:
    """``values[layers, groups, rows]`` on a scale; ``words`` and ``suffix`` are written around a value that is pointed at."""

    name: str
    caption: str
    words: str
    suffix: str
    scale: Scale
    values: Array


@dataclass(frozen=True)
class Series:
    """Bars of a colour, or what without one only a tooltip tells: words for a bar and for the legend, ``values[S]``."""

    name: str
    colour: str
    words: str
    legend: str
    values: Array


@dataclass(frozen=True)
class Bars:
    """A chart of bars from the ground up, the later series before the earlier; ``nothing`` stands where all are 0."""

    name: str
    words: str
    nothing: str
    series: list[Series]
    note: str = ""

    @property
    def drawn(self) -> bool:
        """Whether there is anything to draw."""
        return any(series.values.any() for series in self.series if series.colour)


@dataclass(frozen=True)
class Balancing:
    """What is drawn of balancing over S micro-batches or steps (``unit``) and L layers.

    ``numbers[S]`` label the axis, ``labels[L]`` are the layers' numbers. ``scores`` are balancedness, ``[S, L]`` by method,
    ``names`` what the methods are called. ``where`` says in words under which of them layers are called the least balanced.
    ``make_maps`` returns the heat maps of some of the layers, a row for each of ``rows`` ranks or experts (``row``). ``table``
    has what each step sent.
    """

    size: str
    unit: str
    units: str
    row: str
    rows: int
    where: str
    numbers: Array
    labels: Array
    names: dict[str, str]
    scores: dict[str, Array]
    make_maps: Callable[[list[int], Grouping], list[HeatMap]]
    heading: str
    bars: list[Bars]
    table: list[tuple[str, str, str, str]]

    def summarise(self) -> dict[str, list[str]]:
        """Return, by method, its name, and its mean, 5th percentile and worst over steps and layers, written."""
        figures = {name: (each.mean(), np.percentile(each, 5), each.min()) for name, each in self.scores.items()}
        return {name: [self.names[name], *(f"{value:.4f}" for value in values)] for name, values in figures.items()}

    def find_lowest(self, most: int) -> list[int]:
        """Return the places of the layers of least mean balancedness of homes alone, the least first, at most so many."""
        return [int(place) for place in np.argsort(self.scores["fixed"].mean(0), kind="stable")[:most]]

    def choose_floor(self) -> float:
        """Return where the axis of balancedness begins: the tenth clearly below the lowest value, from 0 to 0.9."""
        lowest = min(float(each.min()) for each in self.scores.values())
        return float(np.clip(np.floor(lowest * 10 - 0.2), 0, 9) / 10)

    def list_notes(self, shown: int, grouping: Grouping) -> list[str]:
        """Return in words what is not shown, and what is lost by drawing groups."""
        notes, layers = [], len(self.labels)
        if shown < layers:
            notes.append(f"Shown: {shown:,} of {layers:,} layers, those least balanced {self.where}.")
        if grouping.size > 1:
            notes.append(
                f"Down-sampled: {grouping.steps:,} {self.units} are drawn as {len(grouping.starts):,} groups of "
                f"{grouping.size:,}. Lines are the mean of a group, the shade below them reaches down to its lowest; heat maps "
                "and bars are means."
            )
        return notes


def divide_by_mean(tokens: Array) -> Array:
    """Return tokens over their mean along the last axis; where there are none, all are equal: 1."""
    mean = tokens.mean(-1, keepdims=True)
    return np.divide(tokens, mean, out=np.ones(tokens.shape), where=mean > 0)


def write_count(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
