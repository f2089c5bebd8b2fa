"""Pages and pictures of recorded balancing: what they show is the record, however long, and titles stay text."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from counterflow.balance.files.recorded import RecordedBalance, read_record
from counterflow.errors import BalanceError
from counterflow.report import balance_page, render_record_html, render_record_svg
from counterflow.report.balance_figures import choose_root, place_loads
from counterflow.report.colours import DARK, LIGHT, choose_load_colour
from counterflow.report.plots import BARS, Box, draw_steps
from counterflow.report.record_figures import (
    choose_clone_colour,
    list_clone_marks,
    list_transfers,
    place_clones,
    write_short,
)
from tests.support.made_record import make_record

EVIL = """</script><script>alert(1)</script><b>"double" 'single' & ]]> --> \x1b[31m \x00"""
SHOWN = EVIL.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
SVG = "{http://www.w3.org/2000/svg}"
PARTS = {0: [1, 6], 3: [2, 5, 4]}


@pytest.fixture
def record(tmp_path: Path) -> RecordedBalance:
    """Twelve steps of five layers, from step 5 on."""
    make_record(tmp_path, PARTS, range(5, 17))
    return read_record(tmp_path)


def read_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def unpack(column: dict[str, Any], *shape: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(column["bits"]), "<u2").reshape(shape) * column["scale"]


def list_texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def find_class(svg: str, name: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if element.get("class") == name]


def weigh(record: RecordedBalance) -> np.ndarray[Any, Any]:
    """``[steps, layers, experts]``, tokens over the mean expert's."""
    loads = record.counts.reshape(len(record.steps), -1, len(record.layers), record.experts).sum(1)
    return np.asarray(loads / loads.mean(-1, keepdims=True))


# ---- the page's data


def test_page_data_is_the_record(record: RecordedBalance) -> None:
    data = read_data(render_record_html(record, "t"))
    assert (data["steps"], data["size"], data["layers"], data["rows"]) == (12, 1, [1, 2, 4, 5, 6], 16)
    assert data["firsts"] == data["lasts"] == list(range(5, 17))
    assert data["chosen"] == record.before.mean(0).argmin()
    for name, values in (("fixed", record.before), ("counterflow", record.after)):
        assert unpack(data["means"][name], 5, 12) == pytest.approx(values.T, abs=2e-5)
    loads, clones = (unpack(drawn["values"], 5, 12, 16) for drawn in data["maps"])
    assert loads == pytest.approx(weigh(record).swapaxes(0, 1), abs=1e-4)
    assert clones == pytest.approx(record.count_clones(np.arange(12)).swapaxes(0, 1), abs=1e-4)
    sent, times = (chart["series"] for chart in data["bars"])
    figures = record.figures
    assert [series["values"] for series in sent[:2]] == [figures["clones"].tolist(), figures["moved"].tolist()]
    assert sent[3]["values"] == pytest.approx(figures["bytes"] / 1e6) and sent[3]["colour"] == ""
    assert times[0]["values"] == pytest.approx(figures["weights_ms"] + figures["gradients_ms"])
    assert times[1]["values"] == pytest.approx(figures["waited_ms"])


def test_tables_are_the_figures(record: RecordedBalance) -> None:
    page, texts = render_record_html(record, "t"), list_texts(render_record_svg(record, "t"))
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', page)
    expected = [f"{value:.4f}" for value in (record.after.mean(), np.percentile(record.after, 5), record.after.min())]
    assert list(cells[1]) == ["with clones", *expected] and set(expected) <= set(texts)
    assert cells[2:] == list_transfers(record) and {cell for row in cells[2:] for cell in row} <= set(texts)
    megabytes = record.figures["bytes"] / 1e6
    assert cells[5] == ("sent and received, MB", *(write_short(v) for v in (megabytes.mean(), megabytes.max(), megabytes.sum())))


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (3, "3"), (0.123456, "0.123"), (12.34, "12.3"), (1234.5, "1,234"), (123456, "123,456")]
)
def test_numbers_of_tables_are_short(value: float, words: str) -> None:
    assert write_short(value) == words


def test_long_runs_are_down_sampled_and_say_so(tmp_path: Path) -> None:
    make_record(tmp_path, {0: [3]}, range(1, 902), experts=4, ranks=2, microbatches=1)
    record = read_record(tmp_path)
    page, svg = render_record_html(record, "t"), render_record_svg(record, "t")
    data = read_data(page)
    assert (data["size"], data["groups"], data["firsts"][1], data["lasts"][1], data["lasts"][-1]) == (3, 301, 4, 6, 901)
    words = "Down-sampled: 901 steps are drawn as 301 groups of 3."
    assert words in page and words in list_texts(svg)
    assert unpack(data["lowest"]["fixed"], 301).min() == pytest.approx(record.before.min(), abs=2e-5)
    loads = record.counts[:3].sum(0)[0]
    assert unpack(data["maps"][0]["values"], 301, 4)[0] == pytest.approx(loads / loads.mean(), abs=1e-3)
    assert data["bars"][0]["series"][0]["values"][0] == pytest.approx(record.figures["clones"][:3].mean(), abs=1e-3)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_record(tmp_path, {0: list(range(0, 260, 2))}, range(60), experts=64, ranks=4, microbatches=1)
    record = read_record(tmp_path)
    monkeypatch.setattr(balance_page, "MAX_LOADS", 300_000)
    page = render_record_html(record, "t")
    data = read_data(page)
    assert 2 * len(data["layers"]) * data["groups"] * 64 <= 300_000 and len(page) < 2_000_000
    kept = [int(layer) // 2 for layer in data["layers"]]
    assert f"Shown: {len(kept)} layers of 130, those least balanced on homes alone." in page
    means = record.before.mean(0)
    assert means[kept].max() <= np.delete(means, kept).min()
    svg = render_record_svg(record, "t")
    assert "Shown: 12 of 130 layers, those least balanced on homes alone." in list_texts(svg) and len(svg) < 4_000_000


# ---- the picture


def test_svg_maps_have_the_colour_of_loads_and_clones(record: RecordedBalance) -> None:
    layer = int(record.before.mean(0).argmin())
    weighed = weigh(record)[:, layer]
    shares = place_loads(weighed, choose_root(weighed)) / 4, place_clones(record.count_clones(np.arange(12))[:, layer], 1.0)
    colours = (lambda share: choose_load_colour(4 * share, LIGHT)), (lambda share: choose_clone_colour(share, LIGHT))
    for drawn, places, choose in zip(find_class(render_record_svg(record, "t"), "map"), shares, colours, strict=True):
        cells: dict[tuple[int, int], str] = {}
        for path in drawn:
            for left, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path.attrib["d"]):
                cells |= {(step, int(row)): path.attrib["fill"] for step in range(int(left), int(left) + int(width))}
        assert len(cells) == 12 * 16
        for place, colour in cells.items():
            channels = [[int(text[n : n + 2], 16) for n in (1, 3, 5)] for text in (colour, choose(float(places[place])))]
            assert np.abs(np.subtract(*channels)).max() <= 4


def test_svg_bars_are_the_transfers(record: RecordedBalance) -> None:
    svg, figures = render_record_svg(record, "t"), record.figures
    both = figures["weights_ms"] + figures["gradients_ms"]
    for name, values, most in (
        ("sent", figures["clones"], figures["clones"].max()),
        ("moved", figures["moved"], figures["clones"].max()),
        ("times", both, both.max()),
        ("waited", figures["waited_ms"], both.max()),
    ):
        heights = [float(bar.attrib["height"]) for bar in find_class(svg, name)]
        assert heights == pytest.approx((values[values > 0] / most * BARS).tolist(), abs=0.01)


def test_steps_that_are_not_there_are_not_labelled() -> None:
    box = Box(0, 0, 400, 10, np.array([1, 2, 3, 4, 105, 106, 107, 108]))
    labels = [text for line in draw_steps(box) for text in re.findall(r">(\d+)</text>", line)]
    assert labels == ["105"], "no other number is a round one or follows one"
    box = Box(0, 0, 400, 10, np.arange(7, 800, 100))
    assert [text for line in draw_steps(box) for text in re.findall(r">(\d+)</text>", line)] == [
        "107", "207", "307", "407", "507", "607", "707"
    ]  # fmt: skip


def test_scale_of_clones_is_even_in_doublings() -> None:
    assert place_clones(np.array([0, 1, 3, 7]), 7.0).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert list_clone_marks(1.0) == [(0, "0"), (100, "1")]
    assert [label for _, label in list_clone_marks(6.5)] == ["0", "1", "3", "6.5"]
    for theme in (LIGHT, DARK):
        assert (choose_clone_colour(0, theme), choose_clone_colour(1, theme)) == (theme["load-2"], theme["activations"])


@pytest.mark.parametrize(("layers", "ranks"), [(1, 1), (2, 4)])
def test_small_and_still_records_are_drawn(tmp_path: Path, layers: int, ranks: int) -> None:
    make_record(tmp_path, {0: list(range(layers))}, range(1), experts=4, ranks=ranks)
    moving = read_record(tmp_path)
    still = replace(moving, figures={name: 0 * values for name, values in moving.figures.items()})
    for record in (moving, still):
        page, svg = render_record_html(record, "t"), render_record_svg(record, "t")
        root = ElementTree.fromstring(svg)
        assert ("NaN" in svg or "nan" in svg or "inf" in svg) is False
        for text in root.iter(f"{SVG}text"):
            assert 0 <= float(text.attrib["x"]) <= float(root.attrib["width"])
        drawn = record.figures["clones"].any()
        assert ("No clone was sent." in page) == ("No clone was sent." in svg) == (not drawn)
        assert ('id="sent"' in page) == drawn and ('id="layer"' in page) == (layers > 1)


# ---- what is not trusted, what is refused


def test_titles_stay_text(record: RecordedBalance) -> None:
    page, harmless = (render_record_html(record, title) for title in (EVIL, "harmless"))
    assert re.findall(r"<(\w+)", page) == re.findall(r"<(\w+)", harmless)
    assert page.count("alert(1)") == 2 and "<script>alert" not in page
    assert SHOWN in list_texts(render_record_svg(record, EVIL))


def test_page_asks_for_nothing_outside_itself(record: RecordedBalance) -> None:
    page = re.sub(r'"bits":"[^"]*"', "", render_record_html(record, "t"))  # base 64 has slashes
    assert not re.search(r"https?:|//\w", page.replace("// ", "")), "an address in the page"
    assert not re.search(r'(?:src|href)="(?!data:,)', page)
    assert "content=\"default-src 'none';" in page


@pytest.mark.parametrize("render", [render_record_html, render_record_svg])
def test_more_experts_than_rows_are_refused(render: Any, record: RecordedBalance) -> None:
    with pytest.raises(BalanceError, match="record of 2,049 experts; allowed: at most 2,048"):
        render(replace(record, experts=2049), "t")
