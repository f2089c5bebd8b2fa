"""A recorded run's balancing as a page and as a picture: balancedness, loads and clones of experts, transfers."""

from functools import partial

from counterflow.balance.files.recorded import RecordedBalance
from counterflow.balance.files.recorded_steps import ADDED
from counterflow.errors import BalanceError
from counterflow.report.balance_figures import (
    Balancing,
    Bars,
    Grouping,
    HeatMap,
    Series,
    divide_by_mean,
    scale_clones,
    scale_loads,
    write_count,
)
from counterflow.report.balance_page import render_page
from counterflow.report.balance_svg import render_picture

RECORD_NAMES = {"fixed": "homes alone", "counterflow": "with clones"}
MAX_EXPERTS = 2048
MEGABYTE = 1e6
# Of each step: what the table of transfers says.
TRANSFERS = {
    "clones": "clones sent",
    "moved": "of them new experts",
    "lent": "just-in-time clones sent",
    "homes_moved": "homes moved",
    "bytes": "clones, sent and received, MB",
    "lent_bytes": "of them just-in-time clones, MB",
    "home_bytes": "homes, sent, MB",
    "tokens_homes": "tokens at homes",
    "tokens_resident": "tokens on resident clones",
    "tokens_just_in_time": "tokens on just-in-time clones",
    "weights_ms": "weights under way, ms",
    "gradients_ms": "gradients under way, ms",
    "waited_ms": "compute waited, ms",
    "homes_ms": "homes under way, ms",
}


def render_record_html(record: RecordedBalance, title: str) -> str:
    """Return one self-contained page of a recorded run, its size bounded whatever the length of the run.

    More than 400 steps, or 3,000,000 cells of heat maps, are drawn in groups, and more than 128 layers are left out but for those
    least balanced on homes alone; the page says both. Its tables count everything. Raises `BalanceError` for a record that
    cannot be drawn or loads that cannot be read.
    """
    return render_page(view_record(record), title)


def render_record_svg(record: RecordedBalance, title: str) -> str:
    """Return an SVG document, its size bounded whatever the length of the run.

    It shows at most the 12 layers least balanced on homes alone, experts of the least balanced, and more than 360 steps, or
    40,000 cells of a heat map, in groups; it says so. Its tables count everything. Raises `BalanceError` for a record that cannot
    be drawn or loads that cannot be read.
    """
    return render_picture(view_record(record), title)


def view_record(record: RecordedBalance) -> Balancing:
    """Return what is drawn of a record; raises `BalanceError` where it cannot be drawn."""
    if record.experts > MAX_EXPERTS:
        raise BalanceError(f"record of {record.experts:,} experts; allowed: at most {MAX_EXPERTS:,} in a page or picture")
    return Balancing(
        size=describe_run(record),
        unit="step",
        units="steps",
        row="expert",
        rows=record.experts,
        where="on homes alone",
        numbers=record.steps,
        labels=record.layers,
        names=RECORD_NAMES,
        scores={"fixed": record.before, "counterflow": record.after},
        make_maps=partial(_make_maps, record),
        heading="Transfers, all layers",
        bars=_list_bars(record),
        table=list_transfers(record),
    )


def _make_maps(record: RecordedBalance, places: list[int], grouping: Grouping) -> list[HeatMap]:
    """Tokens over the mean expert's, and clones."""
    weighed = divide_by_mean(record.sum_loads(grouping.starts)[:, places].swapaxes(0, 1))
    clones = record.count_clones(grouping.starts)[:, places].swapaxes(0, 1)
    scale = scale_clones(max(1.0, float(clones.max())))
    return [
        HeatMap("loads", "tokens per expert, over the mean expert's", "tokens", " × the mean", scale_loads(weighed), weighed),
        HeatMap("clones", "clones per expert, beside its home", "clones", "", scale, clones),
    ]


def _list_bars(record: RecordedBalance) -> list[Bars]:
    figures = record.figures
    both = figures["weights_ms"] + figures["gradients_ms"] + figures["homes_ms"]
    sent = [
        Series("sent", "up-F", "clones sent", "clones sent per step", figures["clones"]),
        Series("moved", "up-B", "of them new experts", "those of another expert than the slot had", figures["moved"]),
        Series("homes", "", "homes moved", "", figures["homes_moved"]),
        Series("bytes", "", "MB", "", (figures["bytes"] + figures["home_bytes"]) / MEGABYTE),
    ]
    times = [
        Series("times", "up-F", "ms of transfers", "ms that weights and gradients were under way per step", both),
        Series("waited", "up-B", "ms of it waited for", "that compute waited for", figures["waited_ms"] + figures["homes_ms"]),
        Series("weights", "", "ms of weights", "", figures["weights_ms"]),
        Series("gradients", "", "ms of gradients", "", figures["gradients_ms"]),
    ]
    return [
        Bars("sent", "Clones sent in each step", "No clone was sent.", sent),
        Bars("times", "Time of transfers in each step", "No transfer took any time.", times),
    ]


def list_transfers(record: RecordedBalance) -> list[tuple[str, str, str, str]]:
    """Return what was sent and how long it took: words, mean and most of a step, and in all.

    First comes max/mean, a mean over layers and micro-batches, then the share of force-balanced of the steps in which it was
    measured, with its least in place of the most. What records of earlier versions lack is left out, and so is what of that never
    happened.
    """
    ratio = record.ratio.mean(1)
    rows = [("max/mean of tokens per rank, with clones", write_short(float(ratio.mean())), write_short(float(ratio.max())), "–")]
    forced, routed = (record.figures[name] for name in ("forced_ms", "routed_ms"))
    if (is_measured := routed > 0).any():
        shares = forced[is_measured] / routed[is_measured]
        mean, least = write_short(float(shares.mean())), write_short(float(shares.min()))
        rows.append(("share of force-balanced, forward: mean and least", mean, least, "–"))
    for name, words in TRANSFERS.items():
        values = record.figures[name] / (MEGABYTE if name.endswith("bytes") else 1.0)
        if name in ADDED and not values.any():
            continue
        mean, most, total = (write_short(float(value)) for value in (values.mean(), values.max(), values.sum()))
        rows.append((words, mean, most, total))
    return rows


def write_short(value: float) -> str:
    """Return a number for a table: three digits, thousands apart."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def describe_run(record: RecordedBalance) -> str:
    """Return in words what was recorded."""
    first, last = int(record.steps[0]), int(record.steps[-1])
    which = f"step {first}" if len(record.steps) == 1 else f"steps {first:,} to {last:,}"
    batches = write_count(int(record.microbatches.sum()), "micro-batch", "micro-batches")
    cluster = record.find_placement(-1).cluster
    ranks = f"{cluster.slots:,} slots on {write_count(cluster.ranks, 'rank')}"
    return f"{which} · {batches} · {write_count(len(record.layers), 'layer')} · {record.experts:,} experts · {ranks}"
