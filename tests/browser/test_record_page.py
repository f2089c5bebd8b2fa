"""The page of recorded balancing in a real browser: what it draws, and what it answers to pointer and keys."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.balance.files.recorded import RecordedBalance, read_record
from counterflow.report import render_record_html
from counterflow.report.balance_figures import choose_root, place_loads
from counterflow.report.colours import DARK, LIGHT, choose_load_colour
from counterflow.report.record_figures import choose_clone_colour
from tests.support.made_record import make_record

# Steps 5 to 24, layers 1, 2 and 6.
STEPS, LAYERS = range(5, 25), [1, 2, 6]

Open = Callable[..., Any]


@pytest.fixture
def record(tmp_path: Path) -> RecordedBalance:
    make_record(tmp_path / "record", {0: [1, 6], 3: [2]}, STEPS)
    return read_record(tmp_path / "record")


@pytest.fixture
def open_record(open_text: Callable[..., Any]) -> Open:
    def open_page(record: RecordedBalance, scheme: str = "light", width: int = 1400, title: str = "a run") -> Any:
        return open_text(render_record_html(record, title), scheme, width)

    return open_page


def locate(page: Any, plot: str, group: int, down: float) -> tuple[float, float]:
    page.locator(f"#{plot}").scroll_into_view_if_needed()
    point = page.evaluate(f"counterflow.locate('{plot}', {group}, {down})")
    return point["x"], point["y"]


def hover(page: Any, plot: str, group: int, down: float = 0.5) -> list[str]:
    page.mouse.move(*locate(page, plot, group, down))
    return str(page.inner_text("#tooltip")).splitlines()


def weigh(record: RecordedBalance) -> np.ndarray[Any, Any]:
    loads = record.sum_loads(np.arange(len(record.steps)))
    return np.asarray(loads / loads.mean(-1, keepdims=True))


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_maps_have_the_colour_of_loads_and_clones(
    open_record: Open, read_pixel: Any, record: RecordedBalance, scheme: str, theme: dict[str, str]
) -> None:
    page = open_record(record, scheme)
    layer = int(record.before.mean(0).argmin())
    places = place_loads(weigh(record), choose_root(weigh(record)))[:, layer]
    clones = record.count_clones(np.arange(20))[:, layer]
    held = np.argwhere(clones == 1)[0].tolist()
    for step, expert in ((0, 0), (11, 3), (19, 15), held):
        for plot, exact in (
            ("loads", choose_load_colour(float(places[step, expert]), theme)),
            ("clones", choose_clone_colour(float(clones[step, expert]), theme)),
        ):
            index = page.evaluate(f"[...document.querySelectorAll('canvas')].findIndex((canvas) => canvas.id === '{plot}')")
            shown = read_pixel(page, index, *locate(page, plot, step, (expert + 0.5) / 16))
            channels = [[int(text[n : n + 2], 16) for n in (1, 3, 5)] for text in (shown, exact)]
            assert np.abs(np.subtract(*channels)).max() <= 1, f"{plot}, step {step}, expert {expert}: {shown}, not {exact}"


def test_hovering_shows_the_values(open_record: Open, record: RecordedBalance) -> None:
    page = open_record(record)
    layer = int(record.before.mean(0).argmin())
    name = LAYERS[layer]
    assert hover(page, "lines", 7) == [
        f"layer {name}, step 12", f"homes alone {record.before[7, layer]:.3f}", f"with clones {record.after[7, layer]:.3f}"
    ]  # fmt: skip
    clones = record.count_clones(np.arange(20))[7, layer]
    expert = int(clones.argmax())
    tokens = f"tokens: {weigh(record)[7, layer, expert]:.3f} × the mean"
    assert hover(page, "clones", 7, (expert + 0.5) / 16) == [f"expert {expert}, layer {name}, step 12", tokens, "clones: 1"]
    figures = {key: values[7] for key, values in record.figures.items()}
    assert hover(page, "sent", 7) == [
        "step 12", f"{figures['clones']:.0f} clones sent", f"{figures['moved']:.0f} of them new experts",
        "0 homes moved", f"{figures['bytes'] / 1e6:.0f} MB",
    ]  # fmt: skip
    assert hover(page, "times", 7)[2:] == [
        f"{figures[f'{key}_ms']:.5g} ms {words}"
        for key, words in (("waited", "of it waited for"), ("weights", "of weights"), ("gradients", "of gradients"))
    ]
    assert page.locator(".cursor:visible").count() == 5, "the line at the pointer's step goes through all plots"


def test_a_layer_is_chosen(open_record: Open, record: RecordedBalance) -> None:
    page = open_record(record)
    page.locator(".layer").nth(1).click()
    assert {name.inner_text() for name in page.locator(".chosen").all()} == {"2"}
    page.click("#next")
    assert hover(page, "lines", 0)[0] == "layer 6, step 5"


def test_steps_that_are_not_there_are_not_labelled(open_record: Open, tmp_path: Path) -> None:
    directory = tmp_path / "gap"
    for steps in (range(1, 5), range(105, 109)):
        make_record(directory, {0: [0]}, steps)
    page = open_record(read_record(directory))
    assert hover(page, "lines", 3)[0] == "layer 0, step 4"
    assert hover(page, "lines", 4)[0] == "layer 0, step 105"


def test_hostile_titles_run_nothing(open_record: Open, record: RecordedBalance) -> None:
    title = """</script><script>window.harm = 1</script><img src=x onerror="window.harm = 2">' " & é"""
    page = open_record(record, title=title)
    assert page.evaluate("window.harm") is None
    assert page.inner_text("h1") == page.title() == title


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 700, 1400])
@pytest.mark.parametrize(("steps", "layers", "experts"), [(1, 1, 4), (450, 1, 8), (30, 58, 256)])
def test_nothing_is_cut_or_covered(
    open_record: Open, find_overlaps: Any, tmp_path: Path, steps: int, layers: int, experts: int, width: int, scheme: str
) -> None:
    make_record(tmp_path / "record", {0: list(range(layers))}, range(steps), experts, microbatches=1)
    page = open_record(read_record(tmp_path / "record"), scheme, width)
    page.screenshot(path=str(tmp_path / "screen.png"), full_page=True)  # pytest keeps it for a look
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert find_overlaps(page) == []
