"""Reports: what is drawn is the schedule, nothing in a title gets out of its place, and what cannot be drawn is refused."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import CounterflowError
from counterflow.report import Picture, render_html, render_svg, render_text, render_trace
from counterflow.report.picture import prepare_pictures, write_bytes, write_number
from counterflow.schedule import Action, ScheduleTable, Span, Timeline, build
from counterflow.schedule.costs import Costs
from counterflow.schedule.layouts import lay_bidirectional, lay_looped, lay_passes, lay_v
from counterflow.schedule.simulation import simulate

COSTS = Costs(f=0.5, i=0.5, w=0.5, p2p=0.05, overlap=0.8)
EVIL = """</script><script>alert(1)</script><b>"double" 'single' & ]]> --> \x1b[31m \x00"""
SHOWN = EVIL.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
SVG = "{http://www.w3.org/2000/svg}"


def draw(name: str = "dualpipev", ranks: int = 4, microbatches: int = 10, title: str = "", costs: Costs = COSTS) -> Picture:
    table = build(name, ranks, microbatches)
    return Picture(title or name, table, simulate(table, costs))


def count_singles(picture: Picture) -> Counter[str]:
    return Counter(single.kind for rank in range(picture.table.ranks) for single in picture.table.singles(rank))


def count_pairs(picture: Picture) -> int:
    return sum(bool(action.parts) for row in picture.table.actions for action in row)


def as_recorded(picture: Picture, offset: float) -> Picture:
    """The same step as a recording has it: from some moment on, ranks mixed, and no reasons."""
    spans = [replace(span, start=span.start + offset, end=span.end + offset) for span in picture.timeline.spans]
    return replace(picture, timeline=Timeline(tuple(sorted(spans, key=lambda span: span.start))))


class Page(HTMLParser):
    """The elements of a page: tags with attributes, and the text of each script, title and h1."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = defaultdict(list)
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside][-1] += data

    def data(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.texts["script"][0])["pictures"]
        return found


def list_rectangles(svg: str) -> Counter[str]:
    return Counter(rect.get("class", "none") for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect"))


def list_slices(trace: str, process: int, rank: int) -> list[dict[str, Any]]:
    events = json.loads(trace)["traceEvents"]
    return [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (process, rank)]


# ---- SVG


def test_svg_has_a_block_per_action_a_frame_per_pair_and_a_hatch_per_wait() -> None:
    picture = draw()
    rectangles = list_rectangles(render_svg([picture]))
    for kind, count in count_singles(picture).items():
        assert rectangles[f"{kind} up"] + rectangles[f"{kind} down"] == count, f"blocks of kind {kind}"
    assert rectangles["F up"] == rectangles["F down"] == 4 * 10, "half of a V's forwards go each way"
    assert rectangles["pair"] == count_pairs(picture) > 0
    assert rectangles["idle"] == len(picture.timeline.waits) > 0


def test_svg_blocks_lie_where_their_times_are() -> None:
    picture = draw("1f1b", 2, 3, costs=Costs(p2p=0.5))
    root = ElementTree.fromstring(render_svg([picture]))
    blocks = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") in ("F up", "B up")]
    lefts = [float(rect.attrib["x"]) for rect in blocks]
    spans = sorted(picture.timeline.spans, key=lambda span: (span.rank, span.start))
    scale = (lefts[1] - lefts[0]) / (spans[1].start - spans[0].start)
    assert lefts == pytest.approx([lefts[0] + span.start * scale for span in spans], abs=0.1)
    ticks = [(text.text, float(text.attrib["x"])) for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "middle"]
    ticks = [(float(label), x) for label, x in ticks if label and label.isdigit()]
    assert len(ticks) > 3
    assert [x for _, x in ticks] == pytest.approx([lefts[0] + time * scale for time, _ in ticks], abs=0.1)


def test_svg_frames_enclose_their_pair_and_text_stays_text() -> None:
    root = ElementTree.fromstring(render_svg([draw()]))
    rectangles = list(root.iter(f"{SVG}rect"))
    for n, rect in enumerate(rectangles):
        if rect.get("class") == "pair":
            upper, lower = rectangles[n - 2], rectangles[n - 1]
            assert upper.attrib["class"].startswith("F") and lower.attrib["class"].startswith("B")
            assert upper.attrib["x"] == lower.attrib["x"]
            assert float(upper.attrib["y"]) + float(upper.attrib["height"]) == pytest.approx(float(lower.attrib["y"]), abs=0.02)
            assert float(rect.attrib["x"]) == pytest.approx(float(upper.attrib["x"]), abs=1)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"rank 0", "rank 3", "F0", "B9"} <= set(texts)


def test_svg_stacks_pictures_on_one_axis() -> None:
    long, short = draw("1f1b", 2, 8), draw("1f1b", 2, 4)
    both = ElementTree.fromstring(render_svg([long, short]))
    alone = ElementTree.fromstring(render_svg([long]))
    rights = [max(float(r.attrib["x"]) + float(r.attrib["width"]) for r in g.iter(f"{SVG}rect")) for g in both.iter(f"{SVG}g")]
    left = 56.0
    share = short.timeline.makespan / long.timeline.makespan
    assert (rights[1] - left) / (rights[0] - left) == pytest.approx(share, rel=0.01)
    assert float(both.attrib["height"]) > 1.4 * float(alone.attrib["height"])


# ---- titles are not trusted


def test_titles_stay_text_on_the_page() -> None:
    page = Page(render_html([draw(title=EVIL), draw(title="plain")]))
    harmless = Page(render_html([draw(title="harmless"), draw(title="plain")]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags], "a title made an element of its own"
    assert page.data()[0]["title"] == SHOWN
    assert page.texts["title"] == [f"{SHOWN} / plain"]
    assert page.texts["h2"] == [SHOWN, "plain"]
    labels = [attributes["aria-label"] or "" for tag, attributes in page.tags if tag == "canvas"]
    assert labels[0].startswith(f"Timeline of {SHOWN}: 4 ranks"), "quotes in a title end the attribute"


def test_titles_stay_text_in_svg_trace_and_terminal() -> None:
    picture = draw(title=EVIL)
    root = ElementTree.fromstring(render_svg([picture]))
    assert SHOWN in [text.text for text in root.iter(f"{SVG}text")]
    assert json.loads(render_trace([picture]))["traceEvents"][0]["args"] == {"name": SHOWN}
    assert "\x1b" not in render_text(picture), "a title reaches the terminal as a control code"


def test_long_titles_are_shortened() -> None:
    page = Page(render_html([draw(title="x" * 10_000)]))
    assert len(page.texts["title"][0]) == 200


# ---- page


def test_page_asks_for_nothing_outside_itself() -> None:
    text = render_html([draw()])
    assert not re.search(r"https?:|//\w", text.replace("// ", "")), "an address in the page"
    outside = [(tag, a) for tag, a in Page(text).tags if a.get("src") or (a.get("href") or "data:,") != "data:,"]
    assert not outside
    policy = [a["content"] for tag, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0] is not None and policy[0].startswith("default-src 'none'")


def test_page_data_is_the_timeline() -> None:
    picture = draw()
    (data,) = Page(render_html([picture])).data()
    spans = defaultdict(list)
    for span in picture.timeline.spans:
        spans[span.rank].append(span)
    for rank, row in enumerate(data["rows"]):
        assert row["kinds"] == "".join("X" if span.action.parts else span.action.kind for span in spans[rank])
        assert row["starts"] == pytest.approx([span.start for span in spans[rank]], abs=1e-5)
        assert row["lengths"] == pytest.approx([span.end - span.start for span in spans[rank]], abs=1e-5)
        assert row["stages"] == [span.action.stage for span in spans[rank]]
        assert row["microbatches"] == [span.action.microbatch for span in spans[rank]]
        backs = [span.action.parts[1] for span in spans[rank] if span.action.parts]
        assert list(zip(row["backStages"], row["backMicrobatches"], strict=True)) == [(b.stage, b.microbatch) for b in backs]
    for rank, levels in enumerate(data["memory"]):
        assert max(levels["activations"]) == data["peakActivations"][rank] == picture.timeline.peak_activations[rank]
        assert max(levels["queued"]) == data["peakQueued"][rank] == picture.timeline.peak_queued[rank]
        assert levels["times"] == sorted(set(levels["times"])), "levels are not in order of time"


def test_comparison_shows_each_schedule_in_one_table() -> None:
    pictures = [draw("1f1b", title="one"), draw("dualpipev", title="two")]
    text = render_html(pictures)
    for picture in pictures:
        figures = [write_number(picture.timeline.makespan), f"{picture.timeline.bubble:.1%}"]
        assert f'<th scope="row">{picture.title}</th><td>{figures[0]}</td><td>{figures[1]}</td>' in text
    assert [tag for tag, _ in Page(text).tags].count("canvas") == 2
    assert 'class="summary"' not in render_html(pictures[:1])


def test_bytes_are_shown_where_they_were_given() -> None:
    sized = draw(costs=replace(COSTS, activation_bytes=2.0**30))
    assert sized.timeline.peak_bytes is not None
    written = write_bytes(max(sized.timeline.peak_bytes))
    assert written.endswith("GiB")
    for text in (render_html([sized]), render_svg([sized]), render_text(sized)):
        assert written in text
    assert "peak bytes" not in render_text(draw())


# ---- trace


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "dualpipev"])
def test_trace_slices_add_up_to_the_timeline(name: str) -> None:
    pictures = [draw(name, 4, 12), as_recorded(draw(name, 4, 8), offset=1234.5)]
    trace = render_trace(pictures)
    for process, picture in enumerate(pictures):
        for rank in range(4):
            slices = list_slices(trace, process, rank)
            spans = [span for span in picture.timeline.spans if span.rank == rank]
            pairs = [s for s in slices if s["cat"] == "pair"]
            nested = [s for s in slices if any(s is not p and s["ts"] == p["ts"] and s["cat"] in "FB" for p in pairs)]
            assert len(nested) == 2 * len(pairs), "an overlapped pair has its F and its B inside"
            assert all(any(s["dur"] == p["dur"] and s["ts"] == p["ts"] for p in pairs) for s in nested)
            top = sorted((s for s in slices if s not in nested), key=lambda s: s["ts"])
            for before, after in zip(top, top[1:], strict=False):
                assert before["ts"] + before["dur"] <= after["ts"] + 1e-6, f"slices of rank {rank} overlap"
            busy = sum(s["dur"] for s in top if s["cat"] != "idle")
            idle = sum(s["dur"] for s in top if s["cat"] == "idle")
            assert busy == pytest.approx(1000 * sum(span.end - span.start for span in spans))
            assert busy + idle == pytest.approx(1000 * picture.timeline.makespan)


def test_trace_names_processes_threads_and_counters() -> None:
    picture = draw()
    trace = json.loads(render_trace([picture]))
    events = trace["traceEvents"]
    assert "1 ms" in trace["otherData"]["time"]
    named = [event["args"].get("name") for event in events if event["ph"] == "M"]
    assert [name for name in named if name] == ["dualpipev", "rank 0", "rank 1", "rank 2", "rank 3"]
    for rank, peak in enumerate(picture.timeline.peak_activations):
        counts = [event["args"] for event in events if event["ph"] == "C" and event["tid"] == rank]
        assert max(held["activations"] for held in counts) == peak
        assert max(held["queued weight gradients"] for held in counts) == picture.timeline.peak_queued[rank]
        assert counts[-1] == {"activations": 0.0, "queued weight gradients": 0.0}


# ---- terminal


def read_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("rank ")]


@given(
    st.sampled_from(["1f1b", "interleaved", "dualpipev"]),
    st.integers(2, 5).flatmap(lambda ranks: st.tuples(st.just(ranks), st.integers(2, 6).map(lambda n: n * ranks))),
    st.integers(40, 150),
)
def test_text_has_a_line_of_the_right_width_per_rank(name: str, size: tuple[int, int], width: int) -> None:
    lines = render_text(draw(name, *size), width).splitlines()
    rows = read_rows("\n".join(lines))
    assert [len(row) for row in rows] == [width] * size[0]
    assert max(map(len, lines)) <= width


def test_text_letters_take_the_share_of_their_time() -> None:
    picture = draw("dualpipev", 8, 32)
    rows = read_rows(render_text(picture, 200))
    cells = len(rows[0]) - len("rank 0 ")
    for rank, row in enumerate(rows):
        letters = row.removeprefix(f"rank {rank} ")
        assert set("FfXxb") <= set(letters), "a V has both directions on every rank"
        drawn = Counter(letters.upper())
        spans = [span for span in picture.timeline.spans if span.rank == rank]
        for kind, letter in (("F", "F"), ("B", "B"), ("I", "I"), ("W", "W"), ("F&B", "X")):
            time = sum(span.end - span.start for span in spans if span.action.kind == kind)
            count = sum(span.action.kind == kind for span in spans)
            assert abs(drawn[letter] - time / picture.timeline.makespan * cells) <= count + 1, f"rank {rank}, {kind}"


def test_text_of_tiny_tables_shows_microbatches_and_directions() -> None:
    rows = read_rows(render_text(draw("1f1b", 4, 4)))
    assert re.findall(r"[FB]\d+", rows[0]) == ["F0", "F1", "F2", "F3", "B0", "B1", "B2", "B3"]
    rows = read_rows(render_text(draw("dualpipev", 2, 4)))
    assert "f0" in rows[0] and "F0" in rows[0], "lower case is missing for the way down"
    assert re.search(r"F3b1", rows[0]), "a pair shows its F and its B"


def test_text_is_plain_unless_colour_is_wanted() -> None:
    picture = draw("dualpipev", 4, 10)
    plain, coloured = render_text(picture), render_text(picture, colour=True)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


# ---- idle


def test_every_form_says_why_a_rank_idles() -> None:
    picture = draw("1f1b", 2, 2)
    reasons = {wait.reason for wait in picture.timeline.waits}
    assert len(reasons) > 2
    (data,) = Page(render_html([picture])).data()
    assert {reason for idle in data["idle"] for reason in idle["reasons"]} == reasons
    svg = ElementTree.fromstring(render_svg([picture]))
    titles = {rect[0].text.split(": ", 1)[1] for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "idle" and rect[0].text}
    assert titles == reasons
    trace = render_trace([picture])
    idle = [s for rank in range(2) for s in list_slices(trace, 0, rank) if s["cat"] == "idle"]
    assert {s["args"]["reason"] for s in idle} == reasons


def test_recorded_steps_start_at_zero_and_keep_their_gaps() -> None:
    simulated = draw("dualpipev", 4, 10)
    (recorded,) = prepare_pictures([as_recorded(simulated, offset=1e4)], 10_000, "a test")
    assert min(span.start for span in recorded.timeline.spans) == 0
    for waits, gaps in zip(simulated.find_idle(), recorded.find_idle(), strict=True):
        gaps = [gap for gap in gaps if gap.end - gap.start > 1e-6]
        assert [(gap.start, gap.end) for gap in gaps] == [pytest.approx((wait.start, wait.end), abs=1e-6) for wait in waits]
        assert all(gap.reason for gap in gaps)


# ---- directions


def draw_empty(layout: Any, microbatches: int = 4) -> Picture:
    return Picture("any", ScheduleTable("any", layout, microbatches, ((),) * layout.ranks), Timeline(()))


@pytest.mark.parametrize(
    ("layout", "down"),
    [
        (lay_looped(4, 2), ""),
        (lay_v(4), "4567"),
        (lay_passes(3, "udu"), "345"),
        (lay_passes(2, "uddu"), "2345"),
    ],
)
def test_stages_of_a_pass_towards_rank_0_flow_down(layout: Any, down: str) -> None:
    stages = range(layout.last_stage + 1)
    found = "".join(str(stage) for stage in stages if draw_empty(layout).find_direction(Action("F", stage, 0)) == "down")
    assert found == down


def test_in_two_directions_the_second_half_of_the_microbatches_flows_down() -> None:
    empty = draw_empty(lay_bidirectional(4), microbatches=6)
    found = [m for m in range(6) if empty.find_direction(Action("F", 0, m)) == "down"]
    assert found == [3, 4, 5]
    spans = tuple(Span(m // 3, Action("F", 0, m), m % 3, m % 3 + 1) for m in range(6))
    text = render_html([replace(empty, timeline=Timeline(spans))])
    assert Page(text).data()[0]["firstDown"] == 3


# ---- what is refused


@pytest.mark.parametrize("render", [render_html, render_svg, render_trace])
def test_nothing_to_draw_is_refused(render: Any) -> None:
    with pytest.raises(CounterflowError, match="no picture given"):
        render([])
    with pytest.raises(CounterflowError, match="'empty' has no spans"):
        render([Picture("empty", build("1f1b", 2, 2), Timeline(()))])


@pytest.mark.parametrize(("render", "limit"), [(render_html, 2_000_000), (render_trace, 2_000_000), (render_svg, 200_000)])
def test_too_many_spans_in_all_pictures_are_refused(render: Any, limit: int) -> None:
    table = build("1f1b", 2, 2)
    spans = (Span(0, Action("F", 0, 0), 0.0, 1.0),) * (limit // 2 + 1)
    with pytest.raises(CounterflowError, match=rf"{limit + 2:,} spans given; .* at most {limit:,}: draw fewer"):
        render([Picture("a", table, Timeline(spans))] * 2)


def test_times_of_another_table_are_refused() -> None:
    wide, narrow = draw("1f1b", 4, 4), draw("1f1b", 2, 4)
    with pytest.raises(CounterflowError, match="the table has 2 ranks and stages 0 to 1"):
        render_svg([Picture("mixed", narrow.table, wide.timeline)])
    with pytest.raises(CounterflowError, match="0F0 on rank 2 given; the table has 2 ranks"):
        render_html([Picture("mixed", narrow.table, Timeline((Span(2, Action("F", 0, 0), 0.0, 1.0),)))])


@pytest.mark.parametrize(("start", "end"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_times_that_are_none_are_refused(start: float, end: float) -> None:
    with pytest.raises(CounterflowError, match="allowed are finite times in order"):
        render_html([Picture("broken", build("1f1b", 2, 2), Timeline((Span(0, Action("F", 0, 0), start, end),)))])


@pytest.mark.parametrize("width", [39, 1001])
def test_text_widths_out_of_range_are_refused(width: int) -> None:
    with pytest.raises(CounterflowError, match=f"width {width} given; allowed are 40 to 1000"):
        render_text(draw(), width)


def test_a_step_that_takes_no_time_can_be_drawn() -> None:
    picture = draw("1f1b", 2, 2, costs=Costs(f=0, i=0, w=0))
    assert len(read_rows(render_text(picture))) == 2
    ElementTree.fromstring(render_svg([picture]))
    assert Page(render_html([picture])).data()[0]["makespan"] == 0
    json.loads(render_trace([picture]))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (90.39999999, "90.4"), (0.05, "0.05"), (123456.7, "123457"), (-1.5, "-1.5"), (100, "100")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert write_number(value) == text
