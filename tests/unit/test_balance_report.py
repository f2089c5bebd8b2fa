"""Pages and pictures of a balance replay and of recorded balancing: what they show is true, however large; titles stay text."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.arrays import Array
from counterflow.balance.cluster import make_cluster
from counterflow.balance.files.recorded import RecordedBalance, read_record
from counterflow.balance.replay import METHODS, Replay
from counterflow.errors import BalanceError
from counterflow.report import balance_page, render_record_html, render_record_svg, render_replay_html, render_replay_svg
from counterflow.report.balance_figures import SHADES, Scale, group_steps, scale_clones, scale_loads
from counterflow.report.balance_svg import BARS, Box, draw_steps
from counterflow.report.colours import DARK, LIGHT, mix_shades
from counterflow.report.record import list_transfers, write_short
from counterflow.report.replay import describe_moves, view_replay, weigh_loads
from tests.support.made_record import make_record
from tests.support.made_replay import make_replay

EVIL = """</script><script>alert(1)</script><b>"double" 'single' & ]]> --> \x1b[31m \x00"""
SHOWN = EVIL.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def record(tmp_path: Path) -> RecordedBalance:
    """Twelve steps of five layers, from step 5 on."""
    make_record(tmp_path, {0: [1, 6], 3: [2, 5, 4]}, range(5, 17))
    return read_record(tmp_path)


@dataclass
class Drawn:
    """A replay or a record, and what is drawn of it: balancedness, the worst layer's maps, ``[S, rows]``, and their scales."""

    html: Callable[[str], str]
    svg: Callable[[str], str]
    scores: dict[str, Array]
    maps: list[Array]
    scales: list[Scale]
    bars: dict[str, tuple[Array, Array]]


def draw_replay(replay: Replay) -> Drawn:
    """The bars are counts, and those whose most is as high as the plot."""
    maps = [weigh_loads(tokens, [2], group_steps(30, 30))[0] for tokens in (replay.fixed_loads, replay.loads)]
    moves, far = replay.moves.sum(1), replay.off_node_moves.sum(1)
    return Drawn(
        lambda title: render_replay_html(replay, title), lambda title: render_replay_svg(replay, title), replay.balancedness,
        maps, [scale_loads(np.stack(maps))] * 2, {"moves": (moves, moves), "far": (far, moves)},
    )  # fmt: skip


def draw_record(record: RecordedBalance) -> Drawn:
    """The bars are counts and times, and those whose most is as high as the plot."""
    layer, figures = int(record.before.mean(0).argmin()), record.figures
    weighed, clones = weigh(record)[:, layer], record.count_clones(np.arange(12))[:, layer]
    both = figures["weights_ms"] + figures["gradients_ms"]
    sent, waited = figures["clones"], figures["waited_ms"]
    return Drawn(
        lambda title: render_record_html(record, title), lambda title: render_record_svg(record, title),
        {"fixed": record.before, "counterflow": record.after}, [weighed, clones], [scale_loads(weighed), scale_clones(1.0)],
        {"sent": (sent, sent), "moved": (figures["moved"], sent), "times": (both, both), "waited": (waited, both)},
    )  # fmt: skip


@pytest.fixture(params=["replay", "record"])
def drawn(request: pytest.FixtureRequest) -> Drawn:
    if request.param == "replay":
        return draw_replay(make_replay())
    return draw_record(request.getfixturevalue("record"))


def weigh(record: RecordedBalance) -> Array:
    """``[steps, layers, experts]``, tokens over the mean expert's."""
    loads = record.counts.reshape(len(record.steps), -1, len(record.layers), record.experts).sum(1)
    return np.asarray(loads / loads.mean(-1, keepdims=True))


def read_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def unpack(column: dict[str, Any], *shape: int) -> Array:
    return np.frombuffer(base64.b64decode(column["bits"]), "<u2").reshape(shape) * column["scale"]


def list_texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def find_class(svg: str, name: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if element.get("class") == name]


# ---- figures


@given(steps=st.integers(1, 200), most=st.integers(1, 60), seed=st.integers(0, 99))
def test_groups_keep_lowest_and_mean(steps: int, most: int, seed: int) -> None:
    values = np.random.default_rng(seed).random((steps, 2))
    grouping = group_steps(steps, most)
    parts = [values[n : n + grouping.size] for n in range(0, steps, grouping.size)]
    assert len(parts) <= most and (grouping.size == 1 or steps > most)
    assert grouping.average(values) == pytest.approx(np.array([part.mean(0) for part in parts]))
    assert (grouping.find_lowest(values) == np.array([part.min(0) for part in parts])).all()
    assert grouping.find_lowest(values).min() == values.min(), "the worst micro-batch is lost"


def test_loads_are_weighed_by_the_mean_of_ranks() -> None:
    loads = np.array([[[2, 4]], [[1, 2]], [[0, 0]], [[5, 15]]])
    assert weigh_loads(loads, [0], group_steps(4, 4)).tolist() == [[[2 / 3, 4 / 3], [2 / 3, 4 / 3], [1, 1], [0.5, 1.5]]]
    assert weigh_loads(loads, [0], group_steps(4, 1)).tolist() == [[[8 / 14.5, 21 / 14.5]]]


@given(st.floats(0, 50), st.floats(0, 50))
def test_scale_of_loads_rises_from_0_by_the_mean_to_its_top(one: float, other: float) -> None:
    scale = scale_loads(np.full(9, 4.0))
    low, high = scale.place(np.array(sorted((one, other))))
    assert 0 <= low <= high <= SHADES
    assert scale.place(np.array([0, 0.5, 1, 2, 4, 99])).tolist() == [0, SHADES / 4, SHADES / 2, SHADES * 3 / 4, SHADES, SHADES]


def test_scale_of_loads_holds_nearly_all() -> None:
    for loads, top in (
        (np.full(1000, 1.01), "1.44"),
        (np.append(np.full(998, 3.9), [40, 50]), "≥ 4"),
        (np.full(10, 99.0), "≥ 36"),
    ):
        assert scale_loads(loads).marks[-1] == (100, top)


def test_scale_of_clones_is_even_in_doublings() -> None:
    assert scale_clones(7.0).place(np.array([0, 1, 3, 7])).tolist() == [0, round(SHADES / 3), round(2 * SHADES / 3), SHADES]
    assert scale_clones(1.0).marks == [(0, "0"), (100, "1")]
    assert [label for _, label in scale_clones(6.5).marks] == ["0", "1", "3", "6.5"]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_mix_their_shades(theme: dict[str, str]) -> None:
    loads, clones = (scale.list_colours(theme) for scale in (scale_loads(np.ones(2)), scale_clones(2.0)))
    assert [loads[n * SHADES // 4] for n in range(5)] == [theme[f"load-{shade}"] for shade in range(5)]
    assert (clones[0], clones[-1]) == (theme["load-2"], theme["activations"])
    assert mix_shades(0.5, ["#000010", "#ff0020"]) == "#800018"


@pytest.mark.parametrize(("lowest", "floor"), [(0.99, 0.9), (0.91, 0.8), (0.55, 0.5), (0.5, 0.4), (0.01, 0.0), (0.0, 0.0)])
def test_axis_begins_clearly_below_the_lowest_value(lowest: float, floor: float) -> None:
    view = replace(view_replay(make_replay()), scores={"fixed": np.ones((2, 1)), "eplb": np.array([[1], [lowest]])})
    assert view.choose_floor() == pytest.approx(floor)


def test_table_has_mean_fifth_percentile_and_worst(drawn: Drawn) -> None:
    page, texts = drawn.html("t"), list_texts(drawn.svg("t"))
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', page)
    for row, values in zip(cells, drawn.scores.values(), strict=False):
        expected = [f"{value:.4f}" for value in (values.mean(), np.percentile(values, 5), values.min())]
        assert list(row[1:]) == expected and {row[0], *expected} <= set(texts)


def test_table_of_transfers_is_the_records(record: RecordedBalance) -> None:
    page, texts = render_record_html(record, "t"), list_texts(render_record_svg(record, "t"))
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', page)
    assert [row[0] for row in cells[:2]] == ["homes alone", "with clones"]
    assert cells[2:] == list_transfers(record) and {cell for row in cells[2:] for cell in row} <= set(texts)
    megabytes = record.figures["bytes"] / 1e6
    assert cells[6] == (
        "clones, sent and received, MB",
        *(write_short(v) for v in (megabytes.mean(), megabytes.max(), megabytes.sum())),
    )


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (3, "3"), (0.123456, "0.123"), (12.34, "12.3"), (1234.5, "1,234"), (123456, "123,456")]
)
def test_numbers_of_tables_are_short(value: float, words: str) -> None:
    assert write_short(value) == words


def test_moves_in_words() -> None:
    replay = replace(make_replay(4, 2), moves=np.array([[3, 0], [0, 0], [1, 0], [0, 0]]))
    far = np.array([[1, 0], [0, 0], [0, 0], [0, 0]])
    words = "4 clones sent in 4 micro-batches and 2 layers: 1 per micro-batch, 0.5 per micro-batch and layer"
    assert describe_moves(replace(replay, off_node_moves=far)) == f"{words}; 1 from another node (25.0%)."
    alone = replace(replay, cluster=make_cluster(8, 72), off_node_moves=0 * far)
    assert describe_moves(alone) == f"{words}; all within the one node."


# ---- the page's data


def test_page_data_is_the_replay() -> None:
    replay = make_replay(30, 3, 8)
    data = read_data(render_replay_html(replay, "t"))
    assert (data["steps"], data["size"], data["groups"], data["layers"]) == (30, 1, 30, [0, 1, 2])
    assert data["firsts"] == data["lasts"] == list(range(50, 80))
    assert data["chosen"] == 2
    assert data["lowest"] == {}
    for name in METHODS:
        assert unpack(data["means"][name], 3, 30) == pytest.approx(replay.balancedness[name].T, abs=2e-5)
    for drawn, tokens in zip(data["maps"], (replay.fixed_loads, replay.loads), strict=True):
        expected = (tokens / tokens.mean(-1, keepdims=True)).transpose(1, 0, 2)
        assert unpack(drawn["values"], 3, 30, 8) == pytest.approx(expected, abs=1e-4)
    assert [drawn["name"] for drawn in data["maps"]] == ["before", "after"]
    moves, far = data["bars"][0]["series"]
    assert moves["values"] == replay.moves.sum(1).tolist()
    assert far["values"] == replay.off_node_moves.sum(1).tolist()


def test_page_data_is_the_record(record: RecordedBalance) -> None:
    data = read_data(render_record_html(record, "t"))
    assert (data["steps"], data["size"], data["layers"], data["rows"]) == (12, 1, [1, 2, 4, 5, 6], 16)
    assert data["firsts"] == data["lasts"] == list(range(5, 17))
    assert data["chosen"] == record.before.mean(0).argmin()
    for name, values in (("fixed", record.before), ("counterflow", record.after)):
        assert unpack(data["means"][name], 5, 12) == pytest.approx(values.T, abs=2e-5)
    loads, clones = (unpack(each["values"], 5, 12, 16) for each in data["maps"])
    assert loads == pytest.approx(weigh(record).swapaxes(0, 1), abs=1e-4)
    assert clones == pytest.approx(record.count_clones(np.arange(12)).swapaxes(0, 1), abs=1e-4)
    sent, times = (chart["series"] for chart in data["bars"])
    figures = record.figures
    assert [series["values"] for series in sent[:2]] == [figures["clones"].tolist(), figures["moved"].tolist()]
    assert sent[3]["values"] == pytest.approx(figures["bytes"] / 1e6) and sent[3]["colour"] == ""
    assert times[0]["values"] == pytest.approx(figures["weights_ms"] + figures["gradients_ms"])
    assert times[1]["values"] == pytest.approx(figures["waited_ms"])


def test_large_replays_are_down_sampled_and_say_so() -> None:
    replay = make_replay(1000, 2, 4)
    page = render_replay_html(replay, "t")
    data = read_data(page)
    assert (data["size"], data["groups"]) == (3, 334)
    assert "Down-sampled: 1,000 micro-batches are drawn as 334 groups of 3." in page
    assert unpack(data["lowest"]["eplb"], 2, 334).min() == pytest.approx(replay.balancedness["eplb"].min(), abs=2e-5)
    assert unpack(data["means"]["eplb"], 2, 334)[:, 0] == pytest.approx(replay.balancedness["eplb"][:3].mean(0), abs=2e-5)
    assert data["bars"][0]["series"][0]["values"][0] == pytest.approx(replay.moves[:3].sum() / 3, abs=1e-3)
    assert (data["firsts"][1], data["lasts"][1], data["lasts"][-1]) == (53, 55, 1049)
    assert "Down-sampled" not in render_replay_html(make_replay(), "t")
    drawn = " ".join(list_texts(render_replay_svg(replay, "t")))
    assert "Down-sampled: 1,000 micro-batches are drawn as 334 groups of 3." in drawn


def test_long_runs_are_down_sampled_and_say_so(tmp_path: Path) -> None:
    make_record(tmp_path, {0: [3]}, range(1, 902), experts=4, ranks=2, microbatches=1)
    record = read_record(tmp_path)
    page = render_record_html(record, "t")
    data = read_data(page)
    assert (data["size"], data["groups"], data["firsts"][1], data["lasts"][1], data["lasts"][-1]) == (3, 301, 4, 6, 901)
    assert "Down-sampled: 901 steps are drawn as 301 groups of 3." in page
    assert data["bars"][0]["series"][0]["words"] == "clones sent per step"
    loads = record.counts[:3].sum(0)[0]
    assert unpack(data["maps"][0]["values"], 301, 4)[0] == pytest.approx(loads / loads.mean(), abs=1e-3)
    assert data["bars"][0]["series"][0]["values"][0] == pytest.approx(record.figures["clones"][:3].mean(), abs=1e-3)


@pytest.mark.parametrize(("steps", "layers", "ranks"), [(2000, 130, 16), (60, 40, 2048), (1500, 2, 2048)])
def test_size_is_bounded(steps: int, layers: int, ranks: int) -> None:
    replay = make_replay(2, 1, ranks)
    shape = (steps, layers, ranks)
    row = np.random.default_rng(0).integers(0, 1000, (steps, 1, ranks))
    # Views: the replay is large, its memory is not.
    wide = {name: np.broadcast_to(row[:, :, 0] / 1000, shape[:2]) for name in METHODS}
    loads, moves = np.broadcast_to(row, shape), np.ones(shape[:2], np.int64)
    replay = Replay(replay.cluster, 0, wide, loads, loads, moves, moves)
    page = render_replay_html(replay, "t")
    data = read_data(page)
    assert len(page) < 10_500_000
    assert 2 * len(data["layers"]) * data["groups"] * ranks <= balance_page.MAX_LOADS
    assert data["groups"] >= balance_page.LEAST_GROUPS / 2
    if len(data["layers"]) < layers:
        assert f"Shown: {len(data['layers'])} of {layers} layers, those least balanced under fixed homes." in page
    assert len(render_replay_svg(replay, "t")) < 4_000_000


def test_layers_left_out_are_those_that_are_balanced_best(tmp_path: Path) -> None:
    replay = make_replay(3, 140, 2)
    make_record(tmp_path, {0: list(range(130))}, range(2), experts=4, ranks=2, microbatches=1)
    record = read_record(tmp_path)
    for page, svg, scores in (
        (render_replay_html(replay, "t"), render_replay_svg(replay, "t"), replay.balancedness["fixed"]),
        (render_record_html(record, "t"), render_record_svg(record, "t"), record.before),
    ):
        means, kept = scores.mean(0), read_data(page)["layers"]
        assert len(kept) == 128 and means[kept].max() <= np.delete(means, kept).min()
        shown = [int(text.removeprefix("layer ")) for text in list_texts(svg) if re.fullmatch(r"layer \d+", text)]
        assert shown == sorted(np.argsort(means, kind="stable")[:12])
        assert any(f"Shown: 12 of {len(means)} layers, those least balanced" in text for text in list_texts(svg))


# ---- the picture


def test_svg_lines_lie_where_their_values_are() -> None:
    replay = make_replay(20, 1, 4)
    (path,) = (e for e in find_class(render_replay_svg(replay, "t"), "eplb") if e.attrib["d"].count("L") == 19)
    points = np.array([[float(n) for n in point.split()] for point in path.attrib["d"][1:].split("L")])
    values = replay.balancedness["eplb"][:, 0]
    assert np.ptp(np.diff(points[:, 0])) < 0.25, "micro-batches are not evenly apart"
    slope = np.polyfit(values, points[:, 1], 1)
    assert slope[0] < -50 and points[:, 1] == pytest.approx(np.polyval(slope, values), abs=0.1)


def test_svg_bars_are_what_was_sent(drawn: Drawn) -> None:
    svg = drawn.svg("t")
    for name, (values, highest) in drawn.bars.items():
        heights = [float(bar.attrib["height"]) for bar in find_class(svg, name)]
        assert heights == pytest.approx((values[values > 0] / highest.max() * BARS).tolist(), abs=0.01)


def test_svg_maps_cover_every_cell_once_in_the_colour_of_its_value(drawn: Drawn) -> None:
    for found, values, scale in zip(find_class(drawn.svg("t"), "map"), drawn.maps, drawn.scales, strict=True):
        cells: dict[tuple[int, int], str] = {}
        for path in found:
            for left, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path.attrib["d"]):
                for step in range(int(left), int(left) + int(width)):
                    assert (step, int(row)) not in cells
                    cells[step, int(row)] = path.attrib["fill"]
        assert len(cells) == values.size
        colours = scale.list_colours(LIGHT)
        assert all(colours[scale.place(values[place])] == colour for place, colour in cells.items())


def test_steps_that_are_not_there_are_not_labelled() -> None:
    box = Box(0, 0, 400, 10, np.array([1, 2, 3, 4, 105, 106, 107, 108]))
    labels = [text for line in draw_steps(box) for text in re.findall(r">(\d+)</text>", line)]
    assert labels == ["105"], "no other number is a round one or follows one"
    box = Box(0, 0, 400, 10, np.arange(7, 800, 100))
    assert [text for line in draw_steps(box) for text in re.findall(r">(\d+)</text>", line)] == [
        "107", "207", "307", "407", "507", "607", "707"
    ]  # fmt: skip


def check_small(page: str, svg: str, plot: str, is_moving: bool, layers: int) -> None:
    root = ElementTree.fromstring(svg)
    assert ("NaN" in svg or "nan" in svg or "inf" in svg) is False
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= float(root.attrib["width"])
    assert ("No clone was sent" in page) == ("No clone was sent" in svg) == (not is_moving)
    assert (f'id="{plot}"' in page) == is_moving
    assert ('id="layer"' in page) == (layers > 1)


@pytest.mark.parametrize(("steps", "layers", "ranks", "nodes"), [(1, 1, 1, 1), (1, 2, 4, 2), (5, 1, 2, 1), (7, 4, 3, 1)])
@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_small_and_still_replays_are_drawn(steps: int, layers: int, ranks: int, nodes: int, rate: float) -> None:
    replay = make_replay(steps, layers, ranks, nodes, rate)
    check_small(render_replay_html(replay, "t"), render_replay_svg(replay, "t"), "moves", replay.moves.any(), layers)


@pytest.mark.parametrize(("layers", "ranks"), [(1, 1), (2, 4)])
def test_small_and_still_records_are_drawn(tmp_path: Path, layers: int, ranks: int) -> None:
    make_record(tmp_path, {0: list(range(layers))}, range(1), experts=4, ranks=ranks)
    moving = read_record(tmp_path)
    still = replace(moving, figures={name: 0 * values for name, values in moving.figures.items()})
    for record in (moving, still):
        is_moving = record.figures["clones"].any()
        check_small(render_record_html(record, "t"), render_record_svg(record, "t"), "sent", is_moving, layers)


def test_a_replay_may_lack_eplb_and_oracle() -> None:
    replay = make_replay()
    recorded = replace(replay, balancedness={name: replay.balancedness[name] for name in ("fixed", "counterflow")})
    assert list(read_data(render_replay_html(recorded, "t"))["means"]) == ["fixed", "counterflow"]
    assert not {"EPLB", "oracle"} & set(list_texts(render_replay_svg(recorded, "t")))


# ---- what is not trusted, what is refused


def test_titles_stay_text(drawn: Drawn) -> None:
    page, harmless = drawn.html(EVIL), drawn.html("harmless")
    assert re.findall(r"<(\w+)", page) == re.findall(r"<(\w+)", harmless)
    assert page.count("alert(1)") == 2 and "<script>alert" not in page
    assert SHOWN in list_texts(drawn.svg(EVIL))
    assert len(list_texts(drawn.svg("x" * 999))[0]) == 200


def test_page_asks_for_nothing_outside_itself(drawn: Drawn) -> None:
    page = re.sub(r'"bits":"[^"]*"', "", drawn.html("t"))  # base 64 has slashes
    assert not re.search(r"https?:|//\w", page.replace("// ", "")), "an address in the page"
    assert not re.search(r'(?:src|href)="(?!data:,)', page)
    assert "content=\"default-src 'none';" in page


NAN = np.full((30, 3), np.nan)


@pytest.mark.parametrize("render", [render_replay_html, render_replay_svg])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fixed_loads": np.zeros((30, 3))}, r"fixed loads of shape \[30, 3\] for 8 ranks"),
        ({"fixed_loads": np.zeros((0, 3, 8))}, r"fixed loads of shape \[0, 3, 8\]"),
        ({"fixed_loads": np.zeros((30, 3, 4))}, r"\[30, 3, 4\] for 8 ranks"),
        ({"loads": np.zeros((29, 3, 8))}, r"loads of shape \[29, 3, 8\]; allowed: \[30, 3, 8\]"),
        ({"loads": np.full((30, 3, 8), -1)}, "loads from -1 to -1"),
        ({"moves": np.zeros((30, 2))}, r"moves of shape \[30, 2\]"),
        ({"off_node_moves": np.full((30, 3), 99)}, "more moves from another node than moves"),
        ({"balancedness": {"fixed": NAN, "counterflow": NAN}}, "balancedness of fixed from nan to nan; allowed: 0 to 1"),
        ({"balancedness": {"fixed": NAN + 1}}, r"methods \['fixed'\]"),
        ({"balancedness": {"fixed": NAN, "counterflow": NAN, "magic": NAN}}, "magic"),
        ({"balancedness": {"fixed": np.full((30, 3), 1.5), "counterflow": NAN}}, "balancedness of fixed from 1.5 to 1.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(render: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BalanceError, match=words) as caught:
        render(replace(make_replay(), **changes), "t")
    assert "\n" not in str(caught.value) and "allowed" in str(caught.value)


@pytest.mark.parametrize("render", [render_record_html, render_record_svg])
def test_more_experts_than_rows_are_refused(render: Any, record: RecordedBalance) -> None:
    with pytest.raises(BalanceError, match="record of 2,049 experts; allowed: at most 2,048"):
        render(replace(record, experts=2049), "t")
