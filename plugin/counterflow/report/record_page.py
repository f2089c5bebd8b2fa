"""The interactive page of a recorded run's balancing: balancedness, loads and clones of experts, transfers, of any length."""

from typing import Any

from counterflow.arrays import Array
from counterflow.balance.files.recorded import RecordedBalance
from counterflow.report.balance_figures import (
    Grouping,
    choose_root,
    describe_grouping,
    divide_by_mean,
    find_lowest_layers,
    list_marks,
    write_count,
)
from counterflow.report.balance_page import choose_detail, encode_lines, encode_series, pack_numbers
from counterflow.report.filling import fill_page
from counterflow.report.picture import clean_text
from counterflow.report.record_figures import (
    RECORD_NAMES,
    Bars,
    check_record,
    describe_run,
    list_bars,
    list_clone_marks,
    list_scores,
    list_transfers,
    summarise_scores,
)


def render_record_html(record: RecordedBalance, title: str) -> str:
    """Return one self-contained page of a recorded run, its size bounded whatever the length of the run.

    More than 400 steps, or 3,000,000 cells of heat maps, are drawn in groups, and more than 128 layers are left out but for those
    least balanced on homes alone; the page says both. Its tables count everything. Raises `BalanceError` for a record that
    cannot be drawn or loads that cannot be read.
    """
    check_record(record)
    shown, grouping = choose_detail(len(record.steps), len(record.layers), record.experts)
    places = sorted(find_lowest_layers(record.before, shown))
    bars = list_bars(record, grouping)
    weighed, clones = _weigh_maps(record, places, grouping)
    most = max(1.0, float(clones.max()))
    root = choose_root(weighed)
    data = _encode_record(record, places, grouping)
    data["maps"] = [
        {"name": "loads", "words": "tokens", "scale": "loads", "root": root, "values": pack_numbers(weighed)},
        {"name": "clones", "words": "clones", "scale": "clones", "most": most, "values": pack_numbers(clones)},
    ]
    data["bars"] = [_encode_bars(chart, grouping) for chart in bars if chart.drawn]
    return fill_page(
        "record",
        "plots",
        data,
        title=clean_text(title),
        size=describe_run(record),
        counted="The tables count every step and layer.",
        summary=[
            (RECORD_NAMES[name], *(f"{value:.4f}" for value in values)) for name, values in summarise_scores(record).items()
        ],
        transfers=list_transfers(record),
        notes=list(filter(None, (_describe_layers(record, places), describe_grouping(grouping, "steps")))),
        units="steps",
        methods=list(RECORD_NAMES.items()),
        grouped=grouping.size > 1,
        layers=[
            (record.layers[place], *(f"{values[:, place].mean():.2f}" for values in list_scores(record).values()))
            for place in places
        ],
        beside="on homes alone and with clones",
        worst="is least balanced on homes alone",
        chosen=data["chosen"],
        marks=[(25 * place, label) for place, label in enumerate(list_marks(weighed, root))],
        clone_marks=list_clone_marks(most),
        charts=[_describe_bars(chart) for chart in bars],
    )


def _weigh_maps(record: RecordedBalance, places: list[int], grouping: Grouping) -> tuple[Array, Array]:
    """Return ``[layers, groups, experts]``: tokens over the mean expert's, and clones."""
    loads, clones = record.sum_loads(grouping.starts), record.count_clones(grouping.starts)
    return divide_by_mean(loads[:, places].swapaxes(0, 1)), clones[:, places].swapaxes(0, 1)


def _encode_record(record: RecordedBalance, places: list[int], grouping: Grouping) -> dict[str, Any]:
    """Return what the page's script draws besides heat maps and bars."""
    values = {name: each[:, places] for name, each in list_scores(record).items()}
    return {
        **encode_lines(record.steps, values, RECORD_NAMES, grouping),
        "unit": "step",
        "units": "steps",
        "row": "expert",
        "rows": record.experts,
        "layers": record.layers[places].tolist(),
        "chosen": places.index(find_lowest_layers(record.before, 1)[0]),
    }


def _encode_bars(chart: Bars, grouping: Grouping) -> dict[str, Any]:
    return {
        "name": chart.name,
        "series": [encode_series(grouping.average(values), words, colour) for _, colour, words, _, values in chart.series],
    }


def _describe_bars(chart: Bars) -> dict[str, Any]:
    shades = {"up-F": "light", "up-B": "dark"}
    return {
        "name": chart.name,
        "words": chart.words,
        "nothing": chart.nothing,
        "drawn": chart.drawn,
        "legend": [(shades[colour], legend) for _, colour, _, legend, _ in chart.series if colour],
    }


def _describe_layers(record: RecordedBalance, places: list[int]) -> str:
    count = len(record.layers)
    if len(places) == count:
        return ""
    return f"Shown: {write_count(len(places), 'layer')} of {count:,}, those least balanced on homes alone."
