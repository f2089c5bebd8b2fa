"""How the parts of a pair shared their rank: from the recorder through the record to every form of report."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.report import (
    Picture,
    describe_differences,
    render_html,
    render_svg,
    render_text,
    render_trace,
    write_differences,
)
from counterflow.runtime import communicate
from counterflow.runtime.handover import HandOver
from counterflow.runtime.recorder import Recorder
from counterflow.schedule import Action, Span, Timeline, build, dump_record, load_record, parse_action, simulate
from counterflow.schedule.comparison import compare, estimate_costs
from counterflow.schedule.sharing import PairTimes, Sharing, find_sharing, sum_pairs
from counterflow.schedule.timeline import Communication, Turns

PAIR = parse_action("(0F1;1B0)OVERLAP_F_B")
F, B = PAIR.parts
# The B has the rank from 10, the F from 12, the B from 15 and waits until 16, the F from 18 with nothing left to wait for.
TIMELINE = Timeline(
    (Span(0, PAIR, 10.0, 20.0),),
    communications=(Communication(0, B, 11.0, 15.0, 16.0, 15.5), Communication(0, F, 14.0, 18.0, 18.0, 17.0)),
    turns=(Turns(0, PAIR, (10.0, 12.0, 15.0, 18.0)),),
)


def find_one(timeline: Timeline = TIMELINE) -> Sharing:
    (found,) = find_sharing(timeline)
    return found


def make_picture(title: str = "a recorded step") -> Picture:
    """A step of DualPipeV on two ranks, as long as its pairs are recorded to be."""
    table = build("dualpipev", 2, 4)
    spans, communications, turns = [], [], []
    for rank in range(2):
        for n, action in enumerate(table.actions[rank]):
            begun = 100.0 + 10 * n
            spans.append(Span(rank, action, begun, begun + 10))
            if action.parts:
                f, b = action.parts
                turns.append(Turns(rank, action, tuple(begun + at for at in (0.0, 2.0, 5.0, 8.0))))
                communications.append(Communication(rank, b, begun + 1, begun + 5, begun + 6, begun + 5.5))
                communications.append(Communication(rank, f, begun + 4, begun + 8, begun + 8, begun + 7))
    return Picture(title, table, Timeline(tuple(spans), communications=tuple(communications), turns=tuple(turns)))


def test_each_part_computes_in_its_turns_but_for_its_waits() -> None:
    forward, backward = find_one().parts
    assert (forward.single, forward.computes, forward.waits) == (F, ((12.0, 15.0), (18.0, 20.0)), ())
    assert (backward.single, backward.computes, backward.waits) == (B, ((10.0, 12.0), (16.0, 18.0)), ((15.0, 16.0),))
    assert forward.under_way == ((14.0, 17.0),) and backward.under_way == ((11.0, 15.5),)


def test_times_of_a_pair_are_computation_and_waiting_and_what_is_hidden_is_computed_over() -> None:
    found = find_one()
    # Under way from 11 to 17, and from 15 to 16 nobody computed.
    assert (found.computation, found.waiting, found.hidden) == (9.0, 1.0, 5.0)
    assert sum_pairs([found, found]) == PairTimes(2, 20.0, 18.0, 10.0, 2.0)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=30), st.lists(st.tuples(*[st.integers(0, 40)] * 4), max_size=12))
def test_times_are_those_of_a_count_moment_by_moment(starts: list[int], drawn: list[tuple[int, ...]]) -> None:
    """Also of records that no run wrote: whatever overlaps, lies outside of the pair or comes twice."""
    communications = []
    for n, times in enumerate(drawn):
        issued, waited, complete, end = sorted(times)
        communications.append(Communication(0, PAIR.parts[n % 2], issued, waited, end, complete if n % 3 else None))
    span = Span(0, PAIR, 5.0, 35.0)
    timeline = Timeline((span,), communications=tuple(communications), turns=(Turns(0, PAIR, tuple(map(float, sorted(starts)))),))
    found = find_one(timeline)
    moments = [n + 0.5 for n in range(5, 35)]
    waited_at = {m for m in moments for one in communications if one.waited <= m <= one.end}
    way_at = {m for m in moments for c in communications if c.issued <= m <= (c.end if c.complete is None else c.complete)}
    assert found.waiting == len(waited_at)
    assert found.hidden == len(way_at - waited_at)
    assert found.computation == 30 - len(waited_at)
    for n, part in enumerate(found.parts):
        own = {m for m in moments for c in communications if c.action == part.single and c.waited <= m <= c.end}
        # The B begins; the number of changes before a moment says whose it is.
        held = {m for m in moments if sum(start < m for start in sorted(starts)[1:]) % 2 != n}
        assert {m for m in moments for start, end in part.computes if start < m < end} == held - own


def test_a_record_without_turns_or_completions_says_what_it_holds() -> None:
    older = replace(TIMELINE, turns=(), communications=tuple(replace(one, complete=None) for one in TIMELINE.communications))
    found = find_one(older)
    assert (found.waiting, found.hidden) == (1.0, 6.0)
    assert [part.computes for part in found.parts] == [((10.0, 20.0),), ((10.0, 15.0), (16.0, 20.0))]
    assert find_sharing(replace(TIMELINE, turns=(), communications=())) == []


def test_single_actions_show_their_waits_and_count_in_no_pair() -> None:
    action = Action("I", 1, 3)
    # A run without split backwards is fitted with B's; its communications say I.
    timeline = Timeline(
        (Span(0, replace(action, kind="B"), 0.0, 4.0),), communications=(Communication(0, action, 1.0, 1.0, 3.0),)
    )
    found = find_one(timeline)
    assert found.parts[0].computes == ((0.0, 1.0), (3.0, 4.0)) and found.waiting == 2.0
    assert sum_pairs([found]) is None


def write(folder: Path, **more: Any) -> Timeline:
    line = json.loads(dump_record(3, "dualpipev", 0, 0, TIMELINE.spans, TIMELINE.communications, TIMELINE.turns)) | more
    (folder / "timeline-rank00000.jsonl").write_text(json.dumps(line) + "\n")
    return load_record(folder, 3)


def test_what_is_recorded_comes_back_and_older_lines_load(tmp_path: Path) -> None:
    assert write(tmp_path) == TIMELINE
    older = write(tmp_path, communications=[["1B0", 11, 15, 16]], turns=[])
    assert older.communications == (Communication(0, B, 11.0, 15.0, 16.0),) and older.turns == ()


@pytest.mark.parametrize(
    "more",
    [
        {"turns": 7},
        {"turns": [["0F1", 1]]},
        {"turns": [[str(PAIR), 2, 1]]},
        {"turns": [[str(PAIR), float("nan")]]},
        {"turns": [[str(PAIR), 1, None]]},
        {"turns": [[]]},
        {"turns": [["<script>", 1]]},
        {"communications": [["1B0", 11, 15]]},
        {"communications": [["1B0", 11, 15, 16, 17]]},
        {"communications": [["1B0", 11, 15, 16, 10]]},
        {"communications": [["1B0", 11, 15, 16, 15.5, 15.5]]},
        {"communications": [["1B0", 11, 15, float("inf")]]},
    ],
)
def test_lines_that_no_run_wrote_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="line 1: not a recorded timeline"):
        write(tmp_path, **more)


def test_a_pair_that_runs_is_recorded_turn_by_turn() -> None:
    handover, recorder = HandOver(), Recorder(0, use_cuda_events=False)
    handover.recorder = recorder

    def run() -> None:
        time.sleep(0.02)
        communicate(lambda: None, lambda _: time.sleep(0.01))
        time.sleep(0.02)

    recorder.start(PAIR)
    recorder.begin_compute()
    handover.run_pair(F, run, B, run)
    recorder.stop()
    communications, turns = recorder.take_communications(), recorder.take_turns()
    timeline = Timeline(tuple(recorder.take_spans()), communications=tuple(communications), turns=tuple(turns))
    assert len(turns[0].starts) == 4, "B, F, B, F"
    found = find_one(timeline)
    for part in found.parts:
        assert len(part.waits) == 1
        assert sum(end - start for start, end in part.computes) >= 0.04
    assert 0.02 <= found.waiting < found.computation and found.computation >= 0.08
    assert recorder.take_turns() == [] and recorder.take_communications() == []


def test_a_transfer_of_torchs_own_tells_when_it_was_complete() -> None:
    class Future:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def add_done_callback(self, tell: Any) -> None:
            self.told.append(tell)

    class Work(dist.Work):
        def __init__(self, future: Future | None) -> None:
            super().__init__()
            self.future = future

        def get_future(self) -> Any:
            if self.future is None:
                raise RuntimeError("this backend has none")
            return self.future

    recorder, futures = Recorder(0, use_cuda_events=False), [Future(), Future()]

    def record(handle: Any, complete: bool) -> Communication:
        issued = recorder.mark()
        arrivals = recorder.watch(handle)
        for future in futures if complete else futures[:1]:
            for tell in future.told:
                tell(None)
        recorder.note(B, issued, recorder.mark(), arrivals)
        (found,) = recorder.take_communications()
        return found

    both = [Work(future) for future in futures]
    found = record(both, complete=True)
    assert found.complete is not None and found.issued <= found.complete <= found.waited
    for future in futures:
        future.told.clear()
    assert record(both, complete=False).complete is None, "one of two is still under way"
    assert record(Work(None), complete=True).complete is None
    assert record(None, complete=True).complete is None


# ---- reports


def test_every_form_says_what_the_pairs_did() -> None:
    picture = make_picture()
    pairs = sum(bool(action.parts) for row in picture.table.actions for action in row)
    assert picture.summarise()["waiting in pairs"] == "10.0%"
    assert picture.summarise()["communication hidden in pairs"] == "83.3%"
    assert "communication hidden in pairs 83.3%" in " ".join(render_text(picture).split())
    page = render_html([picture])
    assert "each rank's pairs" in page and "<td>83.3%</td>" in page
    root = ElementTree.fromstring(render_svg([picture]))
    drawn = [rect.get("class") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert (drawn.count("computes"), drawn.count("waiting"), drawn.count("communication")) == (4 * pairs, pairs, 2 * pairs)
    plain = replace(picture, timeline=replace(picture.timeline, communications=(), turns=()))
    assert "each rank's pairs" not in render_html([plain]) and "waiting for a communication" not in render_svg([plain])


def test_a_comparison_tells_what_the_pairs_of_each_rank_did() -> None:
    picture = make_picture()
    costs = estimate_costs(picture.table, picture.timeline)
    comparison = compare(picture.table, picture.timeline, simulate(picture.table, costs))
    pairs = sum(bool(action.parts) for action in picture.table.actions[1])
    told = describe_differences(comparison, costs)["ranks"][1]["pairs"]
    assert told == {
        "pairs": pairs,
        "time": 10.0 * pairs,
        "computation": 9.0 * pairs,
        "hidden": 5.0 * pairs,
        "waiting": 1.0 * pairs,
    }
    times = f"computation {9000 * pairs} ms, waiting {1000 * pairs} ms; communication hidden {5000 * pairs} ms"
    assert f"  pairs:   {pairs} in {10000 * pairs} ms: {times}, 83.3% of it" in write_differences(comparison, costs)
    plain = replace(comparison, measured=replace(picture.timeline, communications=(), turns=()))
    assert describe_differences(plain, costs)["ranks"][1]["pairs"] is None and "  pairs:" not in write_differences(plain, costs)


def test_trace_slices_lie_in_their_pair_and_communications_on_threads_of_their_own() -> None:
    picture = make_picture()
    events = json.loads(render_trace([picture]))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [names[tid] for tid in sorted(names)] == [
        *("rank 0", "rank 1"),
        *(f"communications of rank {rank}, {way}" for rank in range(2) for way in ("forwards", "backwards")),
    ]
    for rank in range(2):
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == rank]
        pairs = [event for event in slices if event["cat"] == "pair"]
        within = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["cat"] in ("computation", "waiting"))
        assert all(end <= start for (_, end), (start, _) in zip(within, within[1:], strict=False)), "two at one time"
        assert sum(end - start for start, end in within) == sum(pair["dur"] for pair in pairs)
        assert len([event for event in slices if event["cat"] == "waiting"]) == len(pairs)
    for tid, name in names.items():
        if name.endswith("backwards"):
            assert {event["name"][:18] for event in events if event["ph"] == "X" and event["tid"] == tid} == {
                "communication of B"
            }


@pytest.mark.parametrize(
    "render", [lambda p: render_html([p]), lambda p: render_svg([p]), lambda p: render_trace([p]), render_text]
)
def test_communications_outside_of_every_action_are_left_out(render: Any) -> None:
    picture = make_picture()
    far = Communication(7, Action("F", 99, 3), -1e30, 0.0, 1e30)
    outside = Communication(0, picture.timeline.turns[0].action.parts[0], -1e30, -1e30, -1e29)
    timeline = replace(picture.timeline, communications=(*picture.timeline.communications, far, outside))
    assert render(replace(picture, timeline=timeline)) == render(picture)
