"""Pages and pictures of a balance replay: what they show is the replay, however large, and titles stay text."""

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.balance.cluster import make_cluster
from counterflow.balance.placement import measure_balancedness
from counterflow.balance.replay import METHODS, Replay
from counterflow.errors import BalanceError
from counterflow.report import balance_page, balance_svg, render_replay_html, render_replay_svg
from counterflow.report.balance_figures import (
    choose_floor,
    choose_root,
    describe_moves,
    find_worst_layers,
    group_steps,
    place_loads,
    summarise_methods,
    weigh_loads,
)
from counterflow.report.colours import DARK, LIGHT, choose_load_colour

EVIL = """</script><script>alert(1)</script><b>"double" 'single' & ]]> --> \x1b[31m \x00"""
SHOWN = EVIL.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
SVG = "{http://www.w3.org/2000/svg}"


def make_replay(steps: int = 30, layers: int = 3, ranks: int = 8, nodes: int = 2, rate: float = 0.5) -> Replay:
    """Loads whose spread shrinks from method to method, layer 0 the best under fixed homes, the last the worst."""
    random = np.random.default_rng(steps + layers + ranks)
    spread = np.linspace(0.2, 0.6, layers)[:, None]
    loads = {
        name: (1000 * random.lognormal(0, share * spread, (steps, layers, ranks))).astype(np.int64)
        for name, share in zip(METHODS, (1.0, 0.3, 0.1, 0.05), strict=True)
    }
    moves = random.poisson(rate, (steps, layers))
    far = random.binomial(moves, 0.3 if nodes > 1 else 0.0)
    balancedness = {name: measure_balancedness(each) for name, each in loads.items()}
    cluster = make_cluster(ranks, 9 * ranks, nodes)
    return Replay(cluster, 50, balancedness, loads["fixed"], loads["counterflow"], moves, far)


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
    weighed = weigh_loads(loads, 0, group_steps(4, 4))
    assert weighed.tolist() == [[2 / 3, 4 / 3], [2 / 3, 4 / 3], [1, 1], [0.5, 1.5]]
    assert weigh_loads(loads, 0, group_steps(4, 1)).tolist() == [[8 / 14.5, 21 / 14.5]]


@given(st.floats(0, 50), st.floats(0, 50))
def test_scale_of_loads_rises_from_0_by_the_mean_to_its_top(one: float, other: float) -> None:
    low, high = place_loads(np.array(sorted((one, other))), 2.0)
    assert 0 <= low <= high <= 4
    assert place_loads(np.array([0, 0.5, 1, 2, 4, 99]), 2.0).tolist() == pytest.approx([0, 1, 2, 3, 4, 4])


def test_scale_of_loads_holds_nearly_all() -> None:
    assert choose_root(np.full(1000, 1.01)) == 1.2
    assert choose_root(np.append(np.full(998, 3.9), [40, 50])) == 2.0, "two of a thousand stretch the scale"
    assert choose_root(np.full(10, 99.0)) == 6.0


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_of_loads_mix_their_shades(theme: dict[str, str]) -> None:
    for shade in range(5):
        assert choose_load_colour(shade, theme) == theme[f"load-{shade}"]
    assert choose_load_colour(0.5, {"load-0": "#000010", "load-1": "#ff0020"}) == "#800018"


@pytest.mark.parametrize(("lowest", "floor"), [(0.99, 0.9), (0.91, 0.8), (0.55, 0.5), (0.5, 0.4), (0.01, 0.0), (0.0, 0.0)])
def test_axis_begins_clearly_below_the_lowest_value(lowest: float, floor: float) -> None:
    assert choose_floor(lowest) == pytest.approx(floor)


def test_table_has_mean_fifth_percentile_and_worst() -> None:
    replay = make_replay()
    values = np.sort(replay.balancedness["eplb"].ravel())
    expected = (values.mean(), np.percentile(values, 5), values[0])
    assert summarise_methods(replay)["eplb"] == pytest.approx(expected)
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', render_replay_html(replay, "t"))
    assert [cell[0] for cell in cells] == ["fixed homes", "EPLB", "counterflow", "oracle"]
    assert list(cells[1][1:]) == [f"{value:.4f}" for value in expected]
    assert {f"{value:.4f}" for value in expected} <= set(list_texts(render_replay_svg(replay, "t")))


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
    assert data["chosen"] == find_worst_layers(replay, 1)[0] == 2
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
        assert f"Shown: {len(data['layers'])} layers of {layers}" in page
    assert len(render_replay_svg(replay, "t")) < 4_000_000


def test_layers_left_out_are_those_that_fixed_homes_serve_best() -> None:
    replay = make_replay(3, 140, 2)
    data = read_data(render_replay_html(replay, "t"))
    means = replay.balancedness["fixed"].mean(0)
    assert len(data["layers"]) == 128
    assert means[data["layers"]].max() <= np.delete(means, data["layers"]).min()
    svg = render_replay_svg(replay, "t")
    shown = [int(text.removeprefix("layer ")) for text in list_texts(svg) if re.fullmatch(r"layer \d+", text)]
    assert shown == sorted(find_worst_layers(replay, 12))
    assert any("Shown: 12 of 140 layers" in text for text in list_texts(svg))


# ---- the picture


def test_svg_lines_lie_where_their_values_are() -> None:
    replay = make_replay(20, 1, 4)
    (path,) = (e for e in find_class(render_replay_svg(replay, "t"), "eplb") if e.attrib["d"].count("L") == 19)
    points = np.array([[float(n) for n in point.split()] for point in path.attrib["d"][1:].split("L")])
    values = replay.balancedness["eplb"][:, 0]
    assert np.ptp(np.diff(points[:, 0])) < 0.25, "micro-batches are not evenly apart"
    slope = np.polyfit(values, points[:, 1], 1)
    assert slope[0] < -50 and points[:, 1] == pytest.approx(np.polyval(slope, values), abs=0.1)


def test_svg_bars_are_the_moves() -> None:
    replay = make_replay(20, 3, 4)
    svg = render_replay_svg(replay, "t")
    for name, counts in (("moves", replay.moves.sum(1)), ("far", replay.off_node_moves.sum(1))):
        heights = [float(bar.attrib["height"]) for bar in find_class(svg, name)]
        shares = counts[counts > 0] / replay.moves.sum(1).max()
        assert heights == pytest.approx((shares * balance_svg.BARS).tolist(), abs=0.01)


def test_svg_maps_cover_every_cell_once_in_the_colour_of_its_load() -> None:
    replay = make_replay(15, 2, 8)
    maps = find_class(render_replay_svg(replay, "t"), "map")
    weighed = [weigh_loads(tokens, 1, group_steps(15, 15)) for tokens in (replay.fixed_loads, replay.loads)]
    root = choose_root(np.stack(weighed))
    for drawn, loads in zip(maps, weighed, strict=True):
        cells: dict[tuple[int, int], str] = {}
        for path in drawn:
            for left, rank, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path.attrib["d"]):
                for step in range(int(left), int(left) + int(width)):
                    assert (step, int(rank)) not in cells
                    cells[step, int(rank)] = path.attrib["fill"]
        assert len(cells) == 15 * 8
        for (step, rank), colour in cells.items():
            exact = choose_load_colour(float(place_loads(loads[step, rank], root)), LIGHT)
            channels = [[int(text[n : n + 2], 16) for n in (1, 3, 5)] for text in (colour, exact)]
            assert np.abs(np.subtract(*channels)).max() <= 4, f"load {loads[step, rank]}"


@pytest.mark.parametrize(("steps", "layers", "ranks", "nodes"), [(1, 1, 1, 1), (1, 2, 4, 2), (5, 1, 2, 1), (7, 4, 3, 1)])
@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_small_and_still_replays_are_drawn(steps: int, layers: int, ranks: int, nodes: int, rate: float) -> None:
    replay = make_replay(steps, layers, ranks, nodes, rate)
    page, svg = render_replay_html(replay, "t"), render_replay_svg(replay, "t")
    root = ElementTree.fromstring(svg)
    assert ("NaN" in svg or "nan" in svg or "inf" in svg) is False
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= float(root.attrib["width"])
    assert ("No clone was sent" in page) == ("No clone was sent" in svg) == (not replay.moves.any())
    assert ('id="moves"' in page) == bool(replay.moves.any())
    assert ('id="layer"' in page) == (layers > 1)


def test_a_replay_may_lack_eplb_and_oracle() -> None:
    replay = make_replay()
    recorded = replace(replay, balancedness={name: replay.balancedness[name] for name in ("fixed", "counterflow")})
    assert list(read_data(render_replay_html(recorded, "t"))["means"]) == ["fixed", "counterflow"]
    assert not {"EPLB", "oracle"} & set(list_texts(render_replay_svg(recorded, "t")))


# ---- what is not trusted, what is refused


def test_titles_stay_text() -> None:
    page, harmless = (render_replay_html(make_replay(), title) for title in (EVIL, "harmless"))
    assert re.findall(r"<(\w+)", page) == re.findall(r"<(\w+)", harmless)
    assert page.count("alert(1)") == 2 and "<script>alert" not in page
    assert SHOWN in list_texts(render_replay_svg(make_replay(), EVIL))
    assert len(list_texts(render_replay_svg(make_replay(), "x" * 999))[0]) == 200


def test_page_asks_for_nothing_outside_itself() -> None:
    page = re.sub(r'"bits":"[^"]*"', "", render_replay_html(make_replay(), "t"))  # base 64 has slashes
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


def test_importing_reports_loads_no_compiler() -> None:
    code = "import sys, counterflow.report; print([m for m in ('torch', 'numba', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
