"""The page of a balance replay in a real browser: what it draws, and what it answers to pointer and keys."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.balance.cluster import make_cluster
from counterflow.balance.placement import measure_balancedness
from counterflow.balance.replay import Replay
from counterflow.report import render_replay_html
from counterflow.report.balance_figures import choose_root, group_steps, place_loads, weigh_loads
from counterflow.report.colours import DARK, LIGHT, choose_load_colour


def make_replay(steps: int = 40, layers: int = 3, ranks: int = 8, nodes: int = 2, rate: float = 1.0) -> Replay:
    random = np.random.default_rng(steps * layers)
    spreads = {"fixed": np.linspace(0.3, 0.6, layers)[:, None], "eplb": 0.1, "counterflow": 0.03, "oracle": 0.01}
    loads = {
        name: (1000 * random.lognormal(0, spread, (steps, layers, ranks))).astype(np.int64) for name, spread in spreads.items()
    }
    moves = random.poisson(rate, (steps, layers))
    far = random.binomial(moves, 0.3 if nodes > 1 else 0.0)
    balancedness = {name: measure_balancedness(each) for name, each in loads.items()}
    return Replay(make_cluster(ranks, 9 * ranks, nodes), 50, balancedness, loads["fixed"], loads["counterflow"], moves, far)


@dataclass
class Opened:
    """An open page, and what a test asks of it."""

    page: Any
    read_pixel: Callable[[Any, int, float, float], str]

    def locate(self, plot: str, group: int, down: float) -> tuple[float, float]:
        """Where a group is in the window, at a share of the plot's height from its top; scrolled into view."""
        self.page.locator(f"#{plot}").scroll_into_view_if_needed()
        point = self.page.evaluate(f"counterflow.locate('{plot}', {group}, {down})")
        return point["x"], point["y"]

    def hover(self, plot: str, group: int, down: float = 0.5) -> list[str]:
        """Move the pointer there; return the tooltip's lines."""
        self.page.mouse.move(*self.locate(plot, group, down))
        return str(self.page.inner_text("#tooltip")).splitlines()

    def pixel(self, plot: str, group: int, down: float) -> str:
        index = self.page.evaluate(f"[...document.querySelectorAll('canvas')].findIndex((canvas) => canvas.id === '{plot}')")
        return self.read_pixel(self.page, index, *self.locate(plot, group, down))


Open = Callable[..., Opened]


@pytest.fixture
def open_replay(open_text: Callable[..., Any], read_pixel: Callable[[Any, int, float, float], str]) -> Open:
    def open_page(replay: Replay, scheme: str = "light", width: int = 1400, title: str = "a replay") -> Opened:
        return Opened(open_text(render_replay_html(replay, title), scheme, width), read_pixel)

    return open_page


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_maps_have_the_colour_of_their_loads(open_replay: Open, scheme: str, theme: dict[str, str]) -> None:
    replay = make_replay()
    page = open_replay(replay, scheme)
    every = [
        [weigh_loads(tokens, layer, group_steps(40, 40)) for layer in range(3)] for tokens in (replay.fixed_loads, replay.loads)
    ]
    root = choose_root(np.array(every))
    for plot, weighed in (("before", every[0][2]), ("after", every[1][2])):
        places = place_loads(weighed, root)
        for step, rank in ((0, 0), (17, 3), (39, 7), (5, 6)):
            shown, exact = page.pixel(plot, step, (rank + 0.5) / 8), choose_load_colour(float(places[step, rank]), theme)
            channels = [[int(text[n : n + 2], 16) for n in (1, 3, 5)] for text in (shown, exact)]
            assert np.abs(np.subtract(*channels)).max() <= 1, f"{plot}, micro-batch {step}, rank {rank}: {shown}, not {exact}"


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_lines_and_bars_lie_where_their_values_are(open_replay: Open, scheme: str, theme: dict[str, str]) -> None:
    still = np.ones((6, 1))
    base = make_replay(6, 1)
    levels = {"fixed": 0.35, "eplb": 0.6, "counterflow": 0.8, "oracle": 0.95}
    replay = Replay(base.cluster, 0, {n: v * still for n, v in levels.items()}, base.fixed_loads, base.loads, still * 4, still)
    page = open_replay(replay, scheme)
    for name, value in levels.items():
        shades = {page.pixel("lines", group, (1 - value) / 0.7) for group in (1, 2, 3, 4)}
        assert theme[name] in shades, f"{name} is not at {value}"
    assert page.pixel("moves", 2, 0.1) == theme["up-F"]
    assert page.pixel("moves", 2, 0.9) == theme["up-B"], "a quarter of the moves is from another node"


def test_hovering_shows_the_values(open_replay: Open) -> None:
    replay = make_replay()
    page = open_replay(replay)
    names = (("fixed homes", "fixed"), ("EPLB", "eplb"), ("counterflow", "counterflow"), ("oracle", "oracle"))
    assert page.hover("lines", 7) == [
        "layer 2, micro-batch 57", *(f"{words} {replay.balancedness[name][7, 2]:.3f}" for words, name in names)
    ]  # fmt: skip
    loads = [tokens[7, 2, 5] / tokens[7, 2].mean() for tokens in (replay.fixed_loads, replay.loads)]
    assert page.hover("after", 7, 5.5 / 8) == [
        "rank 5, layer 2, micro-batch 57", f"fixed homes: {loads[0]:.3f} × the mean", f"counterflow: {loads[1]:.3f} × the mean"
    ]  # fmt: skip
    moves, far = replay.moves[7].sum(), replay.off_node_moves[7].sum()
    assert page.hover("moves", 7) == ["micro-batch 57", f"{moves} clones", f"{far} of them from another node"]
    assert page.page.locator(".cursor:visible").count() == 4, "the line at the pointer's micro-batch goes through all plots"
    page.page.mouse.move(3, 3)
    assert not page.page.is_visible("#tooltip")
    page.page.locator(".layer").nth(1).hover()
    assert str(page.page.inner_text("#tooltip")).startswith("layer 1, micro-batch")


def test_down_sampled_pages_name_ranges_and_lowest(open_replay: Open) -> None:
    replay = make_replay(1001, 2)
    page = open_replay(replay)
    fixed = replay.balancedness["fixed"][300:303, 1]
    first, second, *_ = page.hover("lines", 100)
    assert first == "layer 1, micro-batches 350 to 352"
    assert second == f"fixed homes {fixed.mean():.3f}, lowest {fixed.min():.3f}"
    assert page.hover("lines", 333)[0] == "layer 1, micro-batches 1049 to 1050", "the last group is shorter"
    assert page.hover("moves", 0)[1].endswith("clones per micro-batch")


def test_a_layer_is_chosen_by_click_list_and_buttons(open_replay: Open) -> None:
    page = open_replay(make_replay(40, 58))
    chosen = page.page.locator(".chosen").first

    def pressed() -> list[int]:
        return page.page.evaluate(
            "[...document.querySelectorAll('.layer')].flatMap((b, n) => b.ariaPressed === 'true' ? [n] : [])"
        )

    before = page.pixel("before", 3, 0.5 / 8)
    page.page.locator(".layer").nth(30).click()
    assert (chosen.inner_text(), page.page.input_value("#layer"), pressed()) == ("30", "30", [30])
    assert page.pixel("before", 3, 0.5 / 8) != before, "the map still shows the layer before"
    page.page.click("#next")
    assert (chosen.inner_text(), pressed()) == ("31", [31])
    page.page.select_option("#layer", "0")
    page.page.click("#previous")
    assert (chosen.inner_text(), pressed()) == ("0", [0])
    assert page.hover("lines", 0)[0] == "layer 0, micro-batch 50"


def test_hostile_titles_run_nothing(open_replay: Open) -> None:
    title = """</script><script>window.harm = 1</script><img src=x onerror="window.harm = 2">' " & é"""
    page = open_replay(make_replay(), title=title)
    assert page.page.evaluate("window.harm") is None
    assert page.page.inner_text("h1") == page.page.title() == title


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 700, 1400])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 0.0), (60, 1, 4, 1, 0.5), (400, 58, 64, 8, 0.5), (401, 2, 300, 2, 5.0)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_nothing_is_cut_or_covered(
    open_replay: Open, find_overlaps: Any, sizes: Any, width: int, scheme: str, tmp_path: Path
) -> None:
    page = open_replay(make_replay(*sizes), scheme, width)
    page.page.screenshot(path=str(tmp_path / "screen.png"), full_page=True)  # pytest keeps it for a look
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert find_overlaps(page.page) == []
