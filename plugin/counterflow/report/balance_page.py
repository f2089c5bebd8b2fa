"""The interactive page of a balance replay or a recorded run: balancedness, heat maps, bars, of any number of steps."""

import base64
from typing import Any

import numpy as np

from counterflow.arrays import Array
from counterflow.report.balance_figures import Balancing, Grouping, HeatMap, Scale, Series, group_steps
from counterflow.report.colours import DARK, LIGHT
from counterflow.report.filling import fill_page
from counterflow.report.picture import clean_text

# What bounds the page, at some 10 MB: numbers in both heat maps, groups of micro-batches or steps, layers.
MAX_LOADS, MAX_GROUPS, MAX_LAYERS = 3_000_000, 400, 128
# With very many rows, layers are left out before time gets coarser than this.
LEAST_GROUPS = 40


def render_page(view: Balancing, title: str) -> str:
    """Return one self-contained page, its size bounded; it says what it leaves out. Its tables count everything."""
    steps, layers = len(view.numbers), len(view.labels)
    shown = min(layers, MAX_LAYERS, max(1, MAX_LOADS // (2 * view.rows * min(steps, LEAST_GROUPS))))
    grouping = group_steps(steps, min(MAX_GROUPS, MAX_LOADS // (2 * view.rows * shown)))
    places = sorted(view.find_lowest(shown))
    maps = view.make_maps(places, grouping)
    data = _encode(view, places, grouping, maps)
    return fill_page(
        "balance",
        "plots",
        data,
        title=clean_text(title),
        view=view,
        notes=view.list_notes(shown, grouping),
        grouped=grouping.size > 1,
        layers=[
            (view.labels[place], *(f"{view.scores[name][:, place].mean():.2f}" for name in ("fixed", "counterflow")))
            for place in places
        ],
        chosen=data["chosen"],
        maps=maps,
    )


def _encode(view: Balancing, places: list[int], grouping: Grouping, maps: list[HeatMap]) -> dict[str, Any]:
    """Return what the page's script draws, its layers at ``places``.

    ``means`` and ``lowest`` are packed ``[layers, groups]``; ``lowest`` is empty where a group is one step.
    """
    values = {name: each[:, places] for name, each in view.scores.items()}
    ends = grouping.starts + grouping.sizes
    per = f" per {view.unit}" if grouping.size > 1 else ""
    return {
        "unit": view.unit,
        "units": view.units,
        "row": view.row,
        "rows": view.rows,
        "layers": view.labels[places].tolist(),
        "chosen": places.index(view.find_lowest(1)[0]),
        "firsts": view.numbers[grouping.starts].tolist(),
        "lasts": view.numbers[ends - 1].tolist(),
        "steps": grouping.steps,
        "size": grouping.size,
        "groups": len(grouping.starts),
        "names": {name: view.names[name] for name in values},
        "floor": view.choose_floor(),
        "means": {name: pack_numbers(grouping.average(each).T) for name, each in values.items()},
        "lowest": {name: pack_numbers(grouping.find_lowest(each).T) for name, each in values.items() if grouping.size > 1},
        "maps": [
            {
                "name": each.name,
                "words": each.words,
                "suffix": each.suffix,
                **_encode_scale(each.scale),
                "values": pack_numbers(each.values),
            }
            for each in maps
        ],
        "bars": [
            {"name": bars.name, "series": [_encode_series(series, grouping, per) for series in bars.series]}
            for bars in view.bars
            if bars.drawn
        ],
    }


def _encode_scale(scale: Scale) -> dict[str, Any]:
    return {"edges": scale.edges.tolist(), "light": scale.list_colours(LIGHT), "dark": scale.list_colours(DARK)}


def _encode_series(series: Series, grouping: Grouping, per: str) -> dict[str, Any]:
    values = [round(float(value), 3) for value in grouping.average(series.values)]
    return {"values": values, "words": series.words + per, "colour": series.colour}


def pack_numbers(values: Array) -> dict[str, Any]:
    """Sixteen bits a number: finer than a pixel, and a third of the size of digits."""
    scale = max(float(values.max()), 1e-9) / 65535
    whole = np.round(values / scale).astype("<u2")
    return {"scale": scale, "bits": base64.b64encode(whole.tobytes()).decode()}
