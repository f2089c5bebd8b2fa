"""The report page in a real browser: what it draws, and what it answers to pointer, wheel and keys."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from counterflow.report import Picture, render_html
from counterflow.report.colours import DARK, LIGHT
from counterflow.schedule import Span, Timeline, add_reductions, build
from counterflow.schedule.costs import Costs
from counterflow.schedule.simulation import simulate
from counterflow.schedule.timeline import Communication, Turns

COSTS = Costs(f=0.5, i=0.5, w=0.5, p2p=0.05, overlap=0.8)
WIDTH = 1400


def draw(name: str = "dualpipev", ranks: int = 8, microbatches: int = 20, title: str = "") -> Picture:
    table = build(name, ranks, microbatches)
    return Picture(title or name, table, simulate(table, COSTS))


@dataclass
class Opened:
    """An open page, and what a test asks of it."""

    page: Any
    read_pixel: Callable[[Any, int, float, float], str]

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def settle(self) -> None:
        """Wait until what was asked for is drawn: a frame is drawn in the next animation frame."""
        self.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def locate(self, rank: int, time: float, share: float = 0.5, index: int = 0, memory: bool = False) -> tuple[float, float]:
        """Where a time of a rank is in the window; ``share`` of the row's height from its top."""
        point = self.ask(f"counterflow.locate({index}, {rank}, {time}, {share}, {str(memory).lower()})")
        return point["x"], point["y"]

    def hover(self, rank: int, time: float, share: float = 0.5, index: int = 0, memory: bool = False) -> str:
        """Move the pointer there; return the tooltip, empty where none is shown."""
        self.page.mouse.move(*self.locate(rank, time, share, index, memory))
        self.settle()
        return str(self.page.inner_text("#tooltip")) if self.page.is_visible("#tooltip") else ""

    def pixel(self, rank: int, time: float, share: float = 0.5, index: int = 0, memory: bool = False) -> str:
        """The colour that the canvas shows there, as #rrggbb."""
        x, y = self.locate(rank, time, share, index, memory)
        return self.read_pixel(self.page, index, x, y)

    def time_at(self, x: float) -> float:
        """The time that is shown at a place in the window."""
        start, end = self.view()
        left, right = self.locate(0, start)[0], self.locate(0, end)[0]
        return start + (x - left) / (right - left) * (end - start)

    def view(self) -> tuple[float, float]:
        shown = self.ask("[counterflow.view.from, counterflow.view.to]")
        return shown[0], shown[1]

    def lit(self) -> tuple[int | None, int | None]:
        """The micro-batches that are hovered and pinned."""
        shown = self.ask("[counterflow.lit.hovered, counterflow.lit.pinned]")
        return shown[0], shown[1]


Open = Callable[..., Opened]


@pytest.fixture
def open_page(open_text: Callable[..., Any], read_pixel: Callable[[Any, int, float, float], str]) -> Open:
    def open_pictures(*pictures: Picture, scheme: str = "light", width: int = WIDTH) -> Opened:
        opened = Opened(open_text(render_html(pictures), scheme, width), read_pixel)
        opened.settle()
        return opened

    return open_pictures


def find_span(picture: Picture, kind: str, rank: int | None = None, least: int = 0) -> Span:
    return next(
        span
        for span in picture.timeline.spans
        if span.action.kind == kind and span.action.microbatch >= least and rank in (None, span.rank)
    )


def middle(span: Any) -> float:
    return float(span.start + span.end) / 2


def beside_label(span: Span) -> float:
    """A time in the block but beside its label."""
    return span.start + 0.12 * (span.end - span.start)


# ---- what is drawn


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_blocks_have_the_colours_of_their_kind_and_direction(open_page: Open, scheme: str, colours: dict[str, str]) -> None:
    picture = draw("dualpipev", 4, 8)
    page = open_page(picture, scheme=scheme)
    last = picture.table.ranks  # stages from here on are on the way down
    for span in (span for span in picture.timeline.spans if not span.action.parts):
        way = "down" if span.action.stage >= last else "up"
        found = page.pixel(span.rank, beside_label(span), share=0.2)
        assert found == colours[f"{way}-{span.action.kind}"], f"{span.action} of rank {span.rank}"
    assert page.pixel(0, 0, share=-0.1) not in (colours["up-F"], colours["down-F"])
    assert page.ask("getComputedStyle(document.body).backgroundColor") == f"rgb{tuple(bytes.fromhex(colours['ground'][1:]))}"


def test_each_action_is_one_block(open_page: Open) -> None:
    picture = draw()
    page = open_page(picture)
    assert page.ask("counterflow.stats.blocks") == len(picture.timeline.spans)


def test_pairs_are_framed_with_f_above_and_b_below(open_page: Open) -> None:
    picture = draw("dualpipev", 4, 8)
    page = open_page(picture)
    pairs = [span for span in picture.timeline.spans if span.action.parts]
    assert pairs
    for span in pairs:
        ways = ["down" if part.stage >= 4 else "up" for part in span.action.parts]
        assert page.pixel(span.rank, beside_label(span), share=0.25) == LIGHT[f"{ways[0]}-F"], str(span.action)
        assert page.pixel(span.rank, beside_label(span), share=0.75) == LIGHT[f"{ways[1]}-B"], str(span.action)
    span, row = pairs[0], 32
    for share in (1.5 / row, (row - 1.5) / row):
        assert brightness(page.pixel(span.rank, beside_label(span), share)) < 200, "no frame above or below"
    left = page.locate(span.rank, span.start)[0]
    reads = [page.pixel(span.rank, page.time_at(left + step)) for step in (0, 1)]
    assert min(map(brightness, reads)) < 260, f"no frame at the left: {reads}"


def brightness(colour: str) -> int:
    """Red, green and blue added up: 0 is black, 765 white."""
    return sum(bytes.fromhex(colour[1:]))


def test_memory_curves_show_what_is_held(open_page: Open) -> None:
    picture = draw("1f1b", 4, 8)
    page = open_page(picture)
    end = picture.timeline.makespan
    text = page.hover(0, end / 2, memory=True)
    assert text.splitlines()[1:] == ["live activations 4", "queued weight gradients 0"]
    assert page.pixel(0, end / 2, share=0.7, memory=True) != LIGHT["ground"], "no area under the curve"
    assert page.pixel(3, end / 2, share=0.3, memory=True) == LIGHT["ground"], "the last rank holds one of four"
    first = find_span(picture, "F", rank=3).start
    low = 0.85
    assert page.pixel(3, first * 0.9, low, memory=True) == LIGHT["ground"], "the last rank holds something before its first F"
    assert page.pixel(3, first * 1.1, low, memory=True) != LIGHT["ground"], "the last rank holds nothing after its first F"


# ---- hover, highlight


@pytest.mark.parametrize("kind", ["F", "B", "I", "W"])
def test_hovering_a_block_tells_its_action(open_page: Open, kind: str) -> None:
    picture = draw()
    page = open_page(picture)
    span = find_span(picture, kind, rank=3)
    lines = page.hover(3, middle(span)).splitlines()
    assert lines[0] == str(span.action)
    assert lines[1].startswith(f"{kind}: stage {span.action.stage}, micro-batch {span.action.microbatch}, ")
    assert lines[2] == "rank 3"
    assert lines[3].startswith(f"start {span.start:g}"[:8]) and f"duration {span.end - span.start:.5g}" in lines[3]


def test_hovering_a_pair_tells_both_parts_and_lights_the_one_under_the_pointer(open_page: Open) -> None:
    picture = draw()
    page = open_page(picture)
    span = find_span(picture, "F&B", rank=2)
    forward, backward = span.action.parts
    assert page.hover(2, middle(span), share=0.25).splitlines()[0] == f"{forward} & {backward} overlapped"
    assert page.lit() == (forward.microbatch, None)
    page.hover(2, middle(span), share=0.75)
    assert page.lit() == (backward.microbatch, None)


def test_hovering_idle_tells_its_reason(open_page: Open) -> None:
    picture = draw()
    page = open_page(picture)
    for wait in sorted(picture.timeline.waits, key=lambda wait: wait.start - wait.end)[:10]:
        lines = page.hover(wait.rank, middle(wait)).splitlines()
        assert lines[:2] == [f"rank {wait.rank} is idle", wait.reason]
    page.page.mouse.move(5, 5)
    page.settle()
    assert not page.page.is_visible("#tooltip")


def test_a_reduction_is_a_strip_below_the_blocks_that_tells_what_it_is(open_page: Open) -> None:
    table = add_reductions(build("1f1b", 4, 8))
    timeline = simulate(table, Costs(reduce=4))
    opened = open_page(Picture("1f1b", table, timeline))
    last = next(span for span in timeline.reductions if span.rank == 3)
    time = middle(last)
    assert opened.pixel(3, time, 0.96) == LIGHT["reduction"]
    assert opened.pixel(3, time, 0.5) != LIGHT["reduction"], "the strip hides why the rank is idle"
    assert opened.hover(3, time, 0.96).startswith("gradient reduction of stage 3")


def test_hovering_dims_the_other_microbatches(open_page: Open) -> None:
    picture = draw("1f1b", 4, 8)
    page = open_page(picture)
    lit, other = find_span(picture, "B", 0), find_span(picture, "B", 2, least=5)
    page.hover(0, middle(lit))
    same = next(span for span in picture.timeline.spans if span.rank == 3 and str(span.action) == "3B0")
    assert page.pixel(3, beside_label(same), 0.2) == LIGHT["up-B"]
    assert page.pixel(2, beside_label(other), 0.2) != LIGHT["up-B"]
    page.page.mouse.move(5, 5)
    page.settle()
    assert page.pixel(2, beside_label(other), 0.2) == LIGHT["up-B"]


def test_clicking_pins_and_escape_lets_go(open_page: Open) -> None:
    picture = draw("1f1b", 4, 8)
    page = open_page(picture)
    span, other = find_span(picture, "B", 1, least=3), find_span(picture, "B", 2, least=5)
    page.hover(1, middle(span))
    page.page.mouse.down()
    page.page.mouse.up()
    page.page.mouse.move(5, 5)
    page.settle()
    assert page.lit()[1] == 3
    assert page.page.input_value("#microbatch") == "3"
    assert page.pixel(2, beside_label(other), 0.2) != LIGHT["up-B"]
    page.page.keyboard.press("Escape")
    page.settle()
    assert page.lit() == (None, None)
    assert page.pixel(2, beside_label(other), 0.2) == LIGHT["up-B"]


def test_a_typed_microbatch_is_pinned(open_page: Open) -> None:
    page = open_page(draw("1f1b", 4, 8))
    page.page.fill("#microbatch", "5")
    assert page.lit()[1] == 5
    page.page.fill("#microbatch", "")
    assert page.lit()[1] is None


# ---- zoom and pan


def test_the_wheel_zooms_around_the_pointer_and_reset_shows_everything(open_page: Open) -> None:
    picture = draw()
    page = open_page(picture)
    whole = page.view()
    assert whole == (0, pytest.approx(picture.timeline.makespan))
    x, y = (round(place) for place in page.locate(3, 20.0))
    time = page.time_at(x)
    for resets in (
        lambda: page.page.keyboard.press("Home"),
        lambda: page.page.click("#reset"),
        lambda: page.page.mouse.dblclick(x, y),
    ):
        page.page.mouse.move(x, y)
        for _ in range(4):
            page.page.mouse.wheel(0, -200)
            page.settle()
        start, end = page.view()
        assert end - start < 0.4 * (whole[1] - whole[0]), "the wheel does not zoom"
        assert page.locate(3, time)[0] == pytest.approx(x, abs=0.01), "the pointer's time moved"
        resets()
        page.settle()
        assert page.view() == whole


def test_dragging_pans_and_keys_zoom(open_page: Open) -> None:
    page = open_page(draw())
    page.page.keyboard.press("+")
    page.page.keyboard.press("+")
    start, end = page.view()
    assert end - start == pytest.approx(0.49 * 60.5, rel=1e-3)
    x, y = page.locate(2, start + 10)
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + 60, y, steps=3)
    page.page.mouse.up()
    page.settle()
    assert page.locate(2, start + 10)[0] == pytest.approx(x + 60, abs=0.5)
    assert page.lit()[1] is None, "a drag is no click"
    page.page.keyboard.press("-")
    page.page.keyboard.press("-")
    assert page.view() == (0, pytest.approx(60.5))


def test_zoomed_in_only_what_is_visible_is_drawn(open_page: Open) -> None:
    picture = draw()
    page = open_page(picture)
    page.ask("Array.from({ length: 8 }, () => document.getElementById('zoom-in').click())")
    page.settle()
    start, end = page.view()
    visible = [span for span in picture.timeline.spans if span.end > start and span.start < end]
    assert 0 < len(visible) < 100
    assert page.ask("counterflow.stats.blocks") == pytest.approx(len(visible), abs=2)


# ---- comparison, size


def test_compared_schedules_share_axis_and_highlight(open_page: Open) -> None:
    pictures = [draw("1f1b", 4, 8), draw("interleaved", 4, 8), draw("dualpipev", 4, 8)]
    page = open_page(*pictures)
    longest = max(picture.timeline.makespan for picture in pictures)
    assert page.view() == (0, pytest.approx(longest))
    assert page.page.locator("canvas").count() == page.page.locator(".summary tbody tr").count() == 3
    lefts = {round(page.locate(0, 3.0, index=index)[0], 3) for index in range(3)}
    assert len(lefts) == 1, "one time is at three places"
    page.page.fill("#microbatch", "7")
    page.page.locator("canvas").nth(2).scroll_into_view_if_needed()
    page.settle()
    for index, picture in enumerate(pictures):
        span = find_span(picture, "F", rank=0)
        assert page.pixel(0, beside_label(span), 0.2, index) != LIGHT["up-F"], f"{picture.title}: micro-batch 0 is not dimmed"


def test_hostile_titles_run_nothing(open_page: Open) -> None:
    title = """</script><script>window.harm = 1</script><img src=x onerror="window.harm = 2">' " & é"""
    page = open_page(draw("1f1b", 2, 2, title=title), draw("1f1b", 2, 3))
    assert page.ask("window.harm") is None
    assert page.page.locator("h2").first.inner_text() == title
    assert page.page.title().startswith("</script>")


def test_large_schedules_draw_in_reasonable_time(open_page: Open) -> None:
    picture = draw("dualpipev", 64, 256)
    page = open_page(picture)
    blocks, milliseconds = page.ask("[counterflow.stats.blocks, counterflow.stats.milliseconds]")
    assert blocks > 10_000
    # About 0.1 s without a GPU; the bound allows for a busy machine.
    assert milliseconds < 3000
    span = find_span(picture, "F", rank=63)
    assert page.hover(63, middle(span)).splitlines()[0] == str(span.action)
    page.ask("Array.from({ length: 12 }, () => document.getElementById('zoom-in').click())")
    page.settle()
    assert page.ask("counterflow.stats.blocks") < 3000


@pytest.mark.parametrize("width", [380, 700, 1400])
@pytest.mark.parametrize("names", [["1f1b"], ["1f1b", "interleaved", "dualpipev"]])
def test_nothing_is_cut_or_covered(open_page: Open, find_overlaps: Any, names: list[str], width: int, tmp_path: Path) -> None:
    page = open_page(*[draw(name, 4, 8) for name in names], width=width)
    page.page.screenshot(path=str(tmp_path / "screen.png"), full_page=True)  # pytest keeps it for a look
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert find_overlaps(page.page) == []


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_a_recorded_pair_shows_who_computes_what_is_under_way_and_where_the_rank_waits(
    open_page: Open, scheme: str, colours: dict[str, str]
) -> None:
    table = build("dualpipev", 2, 4)
    spans = [Span(rank, action, 10.0 * n, 10.0 * n + 10) for rank in range(2) for n, action in enumerate(table.actions[rank])]
    span = next(span for span in spans if span.action.parts)
    (f, b), rank, at = span.action.parts, span.rank, span.start
    communications = (Communication(rank, b, at + 1, at + 6, at + 8, at + 7),)
    turns = (Turns(rank, span.action, (at, at + 2, at + 6)),)
    picture = Picture("recorded", table, Timeline(tuple(spans), communications=communications, turns=turns))
    page = open_page(picture, scheme=scheme)
    for _ in range(4):  # wide enough for all of it
        page.page.mouse.move(*page.locate(rank, at + 5))
        page.page.mouse.wheel(0, -200)
        page.settle()
    page.page.mouse.move(2, 2)
    page.settle()
    way = {part: "down" if part.stage >= table.ranks else "up" for part in (f, b)}
    assert page.pixel(rank, at + 2.2, 0.2) == colours[f"{way[f]}-F"], "the F has the rank"
    assert page.pixel(rank, at + 9.8, 0.6) == colours[f"{way[b]}-B"], "the B has it again"
    for time, share, part in ((9.8, 0.2, f), (1.0, 0.2, f), (3.0, 0.6, b)):
        assert page.pixel(rank, at + time, share) not in (colours[f"{way[part]}-{part.kind}"], colours["ground"]), "pale"
    found = {page.pixel(rank, at + 6.1 + 0.02 * n, share) for n in range(80) for share in (0.2, 0.7)}
    assert colours[f"{way[f]}-F"] not in found and colours[f"{way[b]}-B"] not in found, "the rank waits in both"
    line = [page.pixel(rank, at + 3, 0.8 + 0.01 * n) for n in range(16)]
    assert colours["communication"] in line
    assert colours["communication"] not in [page.pixel(rank, at + 7.6, 0.8 + 0.01 * n) for n in range(16)], "complete by then"
    assert "computation 8, waiting 2, communication hidden 5" in page.hover(rank, at + 3)
    assert "here: F computes, B has a communication under way" in page.hover(rank, at + 3)
    assert "here: B waits for its communication" in page.hover(rank, at + 7.5)


def test_a_recorded_step_is_drawn_from_zero(open_page: Open) -> None:
    picture = draw("1f1b", 2, 4)
    spans = tuple(Span(s.rank, s.action, s.start + 500, s.end + 500) for s in picture.timeline.spans)
    page = open_page(Picture("recorded", picture.table, Timeline(spans)))
    assert page.view() == (0, pytest.approx(picture.timeline.makespan))
    assert page.hover(1, 0.2).splitlines()[:2] == ["rank 1 is idle", "before 1F0; a recorded step does not say why"]
