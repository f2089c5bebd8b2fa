"""What a page and a picture of a recorded run's balancing need: its figures, its sentences, its bars."""

from dataclasses import dataclass

import numpy as np

from counterflow.arrays import Array
from counterflow.balance.files.recorded import RecordedBalance
from counterflow.errors import BalanceError
from counterflow.report.balance_figures import Grouping, summarise, write_count
from counterflow.report.colours import mix_colours
from counterflow.report.picture import write_number

RECORD_NAMES = {"fixed": "homes alone", "counterflow": "with clones"}
MAX_EXPERTS = 2048
MEGABYTE = 1e6
# Of each step: what the table of transfers says.
TRANSFERS = {
    "clones": "clones sent",
    "moved": "of them new experts",
    "homes_moved": "homes moved",
    "bytes": "sent and received, MB",
    "weights_ms": "weights under way, ms",
    "gradients_ms": "gradients under way, ms",
    "waited_ms": "compute waited, ms",
}


@dataclass(frozen=True)
class Bars:
    """A chart of bars: series of class, colour (none: for a tooltip alone), words of a bar, words of the legend, and ``[S]``."""

    name: str
    words: str
    nothing: str
    series: list[tuple[str, str, str, str, Array]]

    @property
    def drawn(self) -> bool:
        """Whether there is anything to draw."""
        return any(values.any() for _, colour, *_, values in self.series if colour)


def check_record(record: RecordedBalance) -> None:
    """Raise `BalanceError` for a record that cannot be drawn."""
    if record.experts > MAX_EXPERTS:
        raise BalanceError(f"record of {record.experts:,} experts; allowed: at most {MAX_EXPERTS:,} in a page or picture")


def list_scores(record: RecordedBalance) -> dict[str, Array]:
    """Return balancedness by method, ``float64[S, L]``, by the names that colours have."""
    return {"fixed": record.before, "counterflow": record.after}


def summarise_scores(record: RecordedBalance) -> dict[str, tuple[float, float, float]]:
    """Return mean, 5th percentile and worst over steps and layers, by method."""
    return {name: summarise(values) for name, values in list_scores(record).items()}


def list_transfers(record: RecordedBalance) -> list[tuple[str, str, str, str]]:
    """Return what was sent and how long it took: words, mean and most of a step, and in all."""
    rows = []
    for name, words in TRANSFERS.items():
        values = record.figures[name] / (MEGABYTE if name == "bytes" else 1.0)
        mean, most, total = (write_short(float(value)) for value in (values.mean(), values.max(), values.sum()))
        rows.append((words, mean, most, total))
    return rows


def write_short(value: float) -> str:
    """Return a number for a table: three digits, thousands apart."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def list_bars(record: RecordedBalance, grouping: Grouping) -> list[Bars]:
    """Return what is drawn of transfers; of a group of steps bars are means."""
    figures, per = record.figures, " per step" if grouping.size > 1 else ""
    both = figures["weights_ms"] + figures["gradients_ms"]
    return [
        Bars(
            "sent",
            "Clones sent in each step",
            "No clone was sent.",
            [
                ("sent", "up-F", f"clones sent{per}", "clones sent per step", figures["clones"]),
                ("moved", "up-B", "of them new experts", "those of another expert than the slot had", figures["moved"]),
                ("homes", "", f"homes moved{per}", "", figures["homes_moved"]),
                ("bytes", "", f"MB{per}", "", figures["bytes"] / MEGABYTE),
            ],
        ),
        Bars(
            "times",
            "Time of transfers in each step",
            "No transfer took any time.",
            [
                ("times", "up-F", f"ms of transfers{per}", "ms that weights and gradients were under way per step", both),
                ("waited", "up-B", "ms of it waited for", "that compute waited for", figures["waited_ms"]),
                ("weights", "", "ms of weights", "", figures["weights_ms"]),
                ("gradients", "", "ms of gradients", "", figures["gradients_ms"]),
            ],
        ),
    ]


def place_clones(clones: Array, most: float) -> Array:
    """Return places on the scale of clones, from 0 to 1 for ``most``: even in doublings of copies."""
    return np.asarray(np.log2(1 + clones) / np.log2(1 + most))


def list_clone_marks(most: float) -> list[tuple[float, str]]:
    """Return places in per cent and labels of the scale of clones: 0, 1, 3, 7 and so on, and the most."""
    doublings = [2.0**n - 1 for n in range(12) if (2.0**n - 1) < 0.6 * most]
    return [(100 * float(place_clones(np.array(count), most)), write_number(round(count, 2))) for count in (*doublings, most)]


def choose_clone_colour(share: float, theme: dict[str, str]) -> str:
    """Return the colour at a place on the scale of clones, from 0 to 1."""
    return mix_colours(theme["load-2"], theme["activations"], share)


def describe_run(record: RecordedBalance) -> str:
    """Return in words what was recorded."""
    first, last = int(record.steps[0]), int(record.steps[-1])
    which = f"step {first}" if len(record.steps) == 1 else f"steps {first:,} to {last:,}"
    batches = write_count(int(record.microbatches.sum()), "micro-batch", "micro-batches")
    cluster = record.find_placement(-1).cluster
    ranks = f"{cluster.slots:,} slots on {write_count(cluster.ranks, 'rank')}"
    return f"{which} · {batches} · {write_count(len(record.layers), 'layer')} · {record.experts:,} experts · {ranks}"
