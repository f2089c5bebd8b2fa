"""Pages of a replay and of recorded balancing in a real browser: what they draw, and what they answer to pointer and keys."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.arrays import Array
from counterflow.balance.files.recorded import RecordedBalance, read_record
from counterflow.balance.replay import Replay
from counterflow.report import render_record_html, render_replay_html
from counterflow.report.balance_figures import Scale, group_steps, scale_clones, scale_loads
from counterflow.report.colours import DARK, LIGHT
from counterflow.report.replay import weigh_loads
from tests.support.made_record import make_record
from tests.support.made_replay import make_replay

TITLE = """</script><script>window.harm = 1</script><img src=x onerror="window.harm = 2">' " & é"""
both_themes = pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])


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

    def check_colours(self, plot: str, values: Array, scale: Scale, theme: dict[str, str], cells: list[Any]) -> None:
        """Compare cells (step, row) of a heat map of ``values[steps, rows]`` with the colours of the scale."""
        colours = scale.list_colours(theme)
        for step, row in cells:
            shown, exact = self.pixel(plot, step, (row + 0.5) / values.shape[1]), colours[scale.place(values[step, row])]
            channels = [[int(text[n : n + 2], 16) for n in (1, 3, 5)] for text in (shown, exact)]
            assert np.abs(np.subtract(*channels)).max() <= 1, f"{plot}, step {step}, row {row}: {shown}, not {exact}"


Open = Callable[..., Opened]


@pytest.fixture
def open_drawn(open_text: Callable[..., Any], read_pixel: Callable[[Any, int, float, float], str]) -> Open:
    """Opens the page of a replay or of a record."""

    def open_page(drawn: Any, scheme: str = "light", width: int = 1400, title: str = "a title") -> Opened:
        render = render_replay_html if isinstance(drawn, Replay) else render_record_html
        return Opened(open_text(render(drawn, title), scheme, width), read_pixel)

    return open_page


@pytest.fixture
def record(tmp_path: Path) -> RecordedBalance:
    """Steps 5 to 24 of layers 1, 2 and 6."""
    make_record(tmp_path / "record", {0: [1, 6], 3: [2]}, range(5, 25))
    return read_record(tmp_path / "record")


def weigh(record: RecordedBalance) -> Array:
    loads = record.sum_loads(np.arange(len(record.steps)))
    return np.asarray(loads / loads.mean(-1, keepdims=True))


@both_themes
def test_maps_have_the_colour_of_their_loads(open_drawn: Open, scheme: str, theme: dict[str, str]) -> None:
    replay = make_replay(40)
    page = open_drawn(replay, scheme)
    every = [weigh_loads(tokens, [0, 1, 2], group_steps(40, 40)) for tokens in (replay.fixed_loads, replay.loads)]
    for plot, weighed in zip(("before", "after"), every, strict=True):
        page.check_colours(plot, weighed[2], scale_loads(np.array(every)), theme, [(0, 0), (17, 3), (39, 7), (5, 6)])


@both_themes
def test_maps_have_the_colour_of_loads_and_clones(
    open_drawn: Open, record: RecordedBalance, scheme: str, theme: dict[str, str]
) -> None:
    page, layer = open_drawn(record, scheme), int(record.before.mean(0).argmin())
    loads, clones = weigh(record)[:, layer], record.count_clones(np.arange(20))[:, layer]
    cells = [(0, 0), (11, 3), (19, 15), np.argwhere(clones == 1)[0].tolist()]
    page.check_colours("loads", loads, scale_loads(weigh(record)), theme, cells)
    page.check_colours("clones", clones, scale_clones(1.0), theme, cells)


@both_themes
def test_lines_and_bars_lie_where_their_values_are(open_drawn: Open, scheme: str, theme: dict[str, str]) -> None:
    still = np.ones((6, 1))
    base = make_replay(6, 1)
    levels = {"fixed": 0.35, "eplb": 0.6, "counterflow": 0.8, "oracle": 0.95}
    replay = Replay(base.cluster, 0, {n: v * still for n, v in levels.items()}, base.fixed_loads, base.loads, still * 4, still)
    page = open_drawn(replay, scheme)
    for name, value in levels.items():
        shades = {page.pixel("lines", group, (1 - value) / 0.7) for group in (1, 2, 3, 4)}
        assert theme[name] in shades, f"{name} is not at {value}"
    assert page.pixel("moves", 2, 0.1) == theme["up-F"]
    assert page.pixel("moves", 2, 0.9) == theme["up-B"], "a quarter of the moves is from another node"


def test_hovering_a_replay_shows_the_values(open_drawn: Open) -> None:
    replay = make_replay(40)
    page = open_drawn(replay)
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


def test_hovering_a_record_shows_the_values(open_drawn: Open, record: RecordedBalance) -> None:
    page, layer = open_drawn(record), int(record.before.mean(0).argmin())
    name = [1, 2, 6][layer]
    assert page.hover("lines", 7) == [
        f"layer {name}, step 12", f"homes alone {record.before[7, layer]:.3f}", f"with clones {record.after[7, layer]:.3f}"
    ]  # fmt: skip
    clones = record.count_clones(np.arange(20))[7, layer]
    expert = int(clones.argmax())
    tokens = f"tokens: {weigh(record)[7, layer, expert]:.3f} × the mean"
    assert page.hover("clones", 7, (expert + 0.5) / 16) == [f"expert {expert}, layer {name}, step 12", tokens, "clones: 1"]
    figures = {key: values[7] for key, values in record.figures.items()}
    assert page.hover("sent", 7) == [
        "step 12", f"{figures['clones']:.0f} clones sent", f"{figures['moved']:.0f} of them new experts",
        "0 homes moved", f"{figures['bytes'] / 1e6:.0f} MB",
    ]  # fmt: skip
    assert page.hover("times", 7)[2:] == [
        f"{figures[f'{key}_ms']:.5g} ms {words}"
        for key, words in (("waited", "of it waited for"), ("weights", "of weights"), ("gradients", "of gradients"))
    ]
    assert page.page.locator(".cursor:visible").count() == 5, "the line at the pointer's step goes through all plots"


def test_down_sampled_pages_name_ranges_and_lowest(open_drawn: Open) -> None:
    replay = make_replay(1001, 2)
    page = open_drawn(replay)
    fixed = replay.balancedness["fixed"][300:303, 1]
    first, second, *_ = page.hover("lines", 100)
    assert first == "layer 1, micro-batches 350 to 352"
    assert second == f"fixed homes {fixed.mean():.3f}, lowest {fixed.min():.3f}"
    assert page.hover("lines", 333)[0] == "layer 1, micro-batches 1049 to 1050", "the last group is shorter"
    assert page.hover("moves", 0)[1].endswith("clones per micro-batch")


def test_a_layer_is_chosen_by_click_list_and_buttons(open_drawn: Open) -> None:
    page = open_drawn(make_replay(40, 58))
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


def test_every_name_of_the_chosen_layer_changes(open_drawn: Open, record: RecordedBalance) -> None:
    page = open_drawn(record)
    page.page.locator(".layer").nth(1).click()
    assert {name.inner_text() for name in page.page.locator(".chosen").all()} == {"2"}
    page.page.click("#next")
    assert page.hover("lines", 0)[0] == "layer 6, step 5"


def test_steps_that_are_not_there_have_no_place(open_drawn: Open, tmp_path: Path) -> None:
    for steps in (range(1, 5), range(105, 109)):
        make_record(tmp_path / "gap", {0: [0]}, steps)
    page = open_drawn(read_record(tmp_path / "gap"))
    assert page.hover("lines", 3)[0] == "layer 0, step 4"
    assert page.hover("lines", 4)[0] == "layer 0, step 105"


def test_hostile_titles_run_nothing(open_drawn: Open) -> None:
    page = open_drawn(make_replay(), title=TITLE)
    assert page.page.evaluate("window.harm") is None
    assert page.page.inner_text("h1") == page.page.title() == TITLE


SMALL_TO_LARGE = {
    "replay": [(1, 1, 1, 1, 0.0), (60, 1, 4, 1, 0.5), (400, 58, 64, 8, 0.5), (401, 2, 300, 2, 5.0)],
    "record": [(1, 1, 4), (450, 1, 8), (30, 58, 256)],
}


@pytest.mark.parametrize("width", [380, 700, 1400])
@pytest.mark.parametrize(("kind", "sizes"), [(kind, sizes) for kind, some in SMALL_TO_LARGE.items() for sizes in some])
def test_nothing_is_cut_or_covered(
    open_drawn: Open, find_overlaps: Any, kind: str, sizes: Any, width: int, tmp_path: Path
) -> None:
    if kind == "record":
        steps, layers, experts = sizes
        make_record(tmp_path / "record", {0: list(range(layers))}, range(steps), experts, microbatches=1)
    page = open_drawn(make_replay(*sizes) if kind == "replay" else read_record(tmp_path / "record"), "light", width)
    page.page.screenshot(path=str(tmp_path / "screen.png"), full_page=True)  # pytest keeps it for a look
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert find_overlaps(page.page) == []
