"""Simulated times: against hand-computed cases, closed formulas, a slow reference, and the tables that torch builds."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.schedule import Action, Costs, ScheduleError, ScheduleTable, build, from_csv, parse_action, simulate
from tests.support.slow_schedule import any_table, run_slowly

a_cost = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0])


def draw_costs(data: st.DataObject, table: ScheduleTable) -> Costs:
    stages = table.layout.last_stage + 1
    f, i, w = (data.draw(st.lists(a_cost, min_size=stages, max_size=stages)) for _ in range(3))
    return Costs(f, i, w, p2p=data.draw(st.sampled_from([0.0, 0.25, 2.0])), overlap=data.draw(st.sampled_from([0.5, 0.75, 1.0])))


@settings(max_examples=150)
@given(any_table, st.data())
def test_every_action_runs_when_the_reference_says(table: ScheduleTable, data: st.DataObject) -> None:
    costs = draw_costs(data, table)
    timeline = simulate(table, costs)
    for rank, expected in enumerate(run_slowly(table, costs)[0]):
        spans = [span for span in timeline.spans if span.rank == rank]
        assert spans == expected, f"rank {rank} of {table.name} runs at other times than its inputs allow"


@settings(max_examples=150)
@given(any_table, st.data(), st.booleans())
def test_spans_and_waits_fill_every_rank(table: ScheduleTable, data: st.DataObject, overlaps: bool) -> None:
    timeline = simulate(table, replace(draw_costs(data, table), p2p_overlaps=overlaps))
    for rank in range(table.ranks):
        pieces = sorted(
            (piece.start, piece.end)
            for piece in (*timeline.spans, *timeline.waits)
            if piece.rank == rank and piece.end > piece.start
        )
        ends = [0.0, *(end for _, end in pieces)]
        starts = [*(start for start, _ in pieces), timeline.makespan]
        assert ends == pytest.approx(starts), f"rank {rank}: time that is neither an action nor an idle span with its reason"
    idle = sum(wait.end - wait.start for wait in timeline.waits)
    if timeline.makespan:
        assert timeline.bubble == pytest.approx(idle / (timeline.makespan * table.ranks))


def test_1f1b_by_hand() -> None:
    timeline = simulate(build("1f1b", 2, 2), Costs(f=1, i=1, w=1, p2p=0.5))
    spans = [(span.rank, str(span.action), span.start, span.end) for span in timeline.spans]
    assert spans == [
        (0, "0F0", 0.0, 1.0), (0, "0F1", 1.0, 2.0), (0, "0B0", 5.0, 7.0), (0, "0B1", 8.0, 10.0),
        (1, "1F0", 1.5, 2.5), (1, "1B0", 2.5, 4.5), (1, "1F1", 4.5, 5.5), (1, "1B1", 5.5, 7.5),
    ]  # fmt: skip
    reasons = [(wait.rank, wait.start, wait.end, wait.reason) for wait in timeline.waits]
    assert reasons == [
        (0, 2.0, 5.0, "0B0 waits for 1B0 of rank 1, 0.5 of it in transfer"),
        (0, 7.0, 8.0, "0B1 waits for 1B1 of rank 1, 0.5 of it in transfer"),
        (1, 0.0, 1.5, "1F0 waits for 0F0 of rank 0, 0.5 of it in transfer"),
        (1, 7.5, 10.0, "nothing left to do"),
    ]
    assert (timeline.peak_activations, timeline.peak_queued) == ((2.0, 1.0), (0.0, 0.0))


def test_a_transfer_that_stops_its_ranks_holds_both() -> None:
    table = from_csv("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1")
    timeline = simulate(table, Costs(f=1, i=1, w=1, p2p=0.5, p2p_overlaps=False))
    spans = [(str(span.action), span.start) for span in timeline.spans]
    # 0F0 moves at 1.0 to 1.5. Rank 0 would send 0F1 at 2.5; rank 1 stops for it after 1F0, at 2.5 as well.
    assert spans[:4] == [("0F0", 0.0), ("0F1", 1.5), ("0B0", 5.5), ("0B1", 9.0)]
    assert spans[4:] == [("1F0", 1.5), ("1B0", 3.0), ("1F1", 5.5), ("1B1", 6.5)]
    assert "1B0 waits for 0F1 of rank 0, 0.5 of it in transfer" in [wait.reason for wait in timeline.waits]


def test_a_pair_takes_its_share_of_both_parts() -> None:
    timeline = simulate(from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1"), Costs(f=1, i=2, w=3, overlap=0.5))
    assert [(span.start, span.end) for span in timeline.spans] == [(0, 1), (1, 4), (4, 9)]
    assert timeline.peak_activations == (2.0,)


def test_bytes_are_counted_per_stage() -> None:
    table = from_csv("0F0,0F1,1F0,1I0,1W0,0I0,0W0,1F1,1I1,0I1,1W1,0W1")
    timeline = simulate(table, Costs(activation_bytes=[10, 100], queued_bytes=[1, 5]))
    assert timeline.peak_bytes == (120.0,)
    assert simulate(table, Costs()).peak_bytes is None


@given(st.integers(1, 6), st.integers(1, 14), a_cost, a_cost, a_cost)
def test_closed_formulas_hold_where_they_claim(ranks: int, extra: int, f: float, i: float, w: float) -> None:
    costs = Costs(f, i, w)
    microbatches = ranks + extra
    each = f + i + w
    # (P-1)(F+B), GPipe and 1F1B
    for name in ("gpipe", "1f1b"):
        assert simulate(build(name, ranks, microbatches), costs).makespan == pytest.approx((microbatches + ranks - 1) * each)
    # (P-1)(F+I-W), ZB-H1, where W fits into what it fills
    if f == i == w:
        assert simulate(build("zb-h1", ranks, microbatches), costs).makespan == pytest.approx(
            microbatches * each + (ranks - 1) * f
        )
        whole = 2 * ranks + extra
        assert simulate(build("zbv", ranks, whole), costs).makespan == pytest.approx(2 * whole * each + (ranks - 1) * f)
    if ranks > 1:
        for vpp in (2, 3):
            table = build("interleaved", ranks, ranks * (1 + extra % 3), vpp=vpp)
            work = table.microbatches * vpp * each
            assert simulate(table, costs).makespan == pytest.approx(work + (ranks - 1) * each)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dualpipes_bubble_formulas_hold(ranks: int) -> None:
    # (P-1)(F&B + B - 3W), full DualPipe (P/2-1)(F&B + B - 3W), where F = I = W and a pair takes F + B: DualPipe README.
    each = 3 + 2 - 3
    makespan = simulate(build("dualpipev", ranks, 4 * ranks), Costs()).makespan
    assert makespan == pytest.approx(8 * ranks * 3 + (ranks - 1) * each)
    makespan = simulate(build("dualpipe", ranks, 4 * ranks), Costs()).makespan
    assert makespan == pytest.approx(4 * ranks * 3 + (ranks / 2 - 1) * each)


@pytest.mark.parametrize(
    ("name", "options", "chunks", "bubble", "makespan", "activations"),
    [
        ("zbv", {}, 2, 3.52, 99.5, 8.0),
        ("dualpipev", {}, 2, 6.80, 86.8, 8.5),
        ("interleaved", {"vpp": 2, "ep_overlap": True}, 2, 9.86, 90.0, 12.0),
        ("interleaved", {"vpp": 4, "ep_overlap": True}, 4, 5.19, 85.8, 10.0),
        ("interleaved", {"vpp": 8, "ep_overlap": True}, 8, 2.66, 83.7, 9.0),
        ("1f1b", {}, 1, 17.95, 117.0, 8.0),
    ],
)
def test_the_known_figures(
    name: str, options: dict[str, Any], chunks: int, bubble: float, makespan: float, activations: float
) -> None:
    table = build(name, 8, 32, **options)
    each = 1 / chunks
    assert round(100 * simulate(table, Costs(each, each, each)).bubble, 2) == bubble
    timeline = simulate(table, Costs(each, each, each, overlap=0.8))
    assert timeline.makespan == pytest.approx(makespan)
    assert max(timeline.peak_activations) == activations


def list_torch_rows(name: str, ranks: int, microbatches: int) -> list[list[Action]]:
    """The table that torch's schedule class computes, without a process group."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    classes = {"interleaved": "ScheduleInterleaved1F1B", "zbv": "ScheduleZBVZeroBubble", "dualpipev": "ScheduleDualPipeV"}
    theirs = object.__new__(getattr(schedules, classes.get(name, "Schedule1F1B")))
    theirs.pp_group_size, theirs._n_microbatches, theirs.n_local_stages = ranks, microbatches, 2
    theirs.num_stages = theirs._num_stages = ranks * (1 if name == "1f1b" else 2)
    theirs.number_of_rounds = max(1, microbatches // ranks)
    theirs.microbatches_per_round = microbatches // theirs.number_of_rounds
    if name == "1f1b":
        rows = theirs._get_pipeline_order()
    else:
        rows = {rank: theirs._calculate_single_rank_operations(rank) for rank in range(ranks)}
    row_of = [[str(action) for action in rows[rank] if action is not None] for rank in range(ranks)]
    parsed = [[parse_action(text) for text in row if "REDUCE_GRAD" not in text] for row in row_of]
    if name == "1f1b":
        # torch counts the last rank's forwards from 1.
        first = min(action.microbatch for action in parsed[-1] if action.kind == "F")
        parsed[-1] = [replace(a, microbatch=a.microbatch - first) if a.kind == "F" else a for a in parsed[-1]]
    return parsed


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_makespans_equal_those_of_torchs_tables(name: str, ranks: int) -> None:
    for microbatches in (2 * ranks, 3 * ranks, 5 * ranks):
        ours = build(name, ranks, microbatches)
        text = "\n".join(",".join(map(str, row)) for row in list_torch_rows(name, ranks, microbatches))
        theirs = from_csv(text)
        for costs in (Costs(), Costs(1, 2, 1.5, p2p=0.25, overlap=0.8), Costs(0.5, 0.25, 0.75, p2p=1, overlap=0.7)):
            assert simulate(ours, costs).makespan == simulate(theirs, costs).makespan, f"{name} {ranks} {microbatches} {costs}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"f": -1}, "cost f -1 given; allowed: a finite number from 0 to 1e"),
        ({"i": math.nan}, "cost i nan given"),
        ({"w": [1.0, math.inf]}, "cost w inf given"),
        ({"p2p": -0.1}, "cost p2p -0.1 given"),
        ({"overlap": 0}, "overlap 0 given; allowed: a finite number from 1e-06 to 2"),
        ({"overlap": math.nan}, "overlap nan given"),
        ({"activation_bytes": -5}, "cost activation_bytes -5 given"),
    ],
)
def test_costs_that_are_none_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        Costs(**given)


def test_costs_of_another_layout_are_named() -> None:
    with pytest.raises(ScheduleError, match="cost f has 3 numbers; the layout has 8 stages: give one number or 8"):
        simulate(build("dualpipev", 4, 8), Costs(f=[1, 2, 3]))


def test_a_table_that_deadlocks_is_named() -> None:
    table = build("1f1b", 2, 2)
    first = tuple(map(parse_action, ("0F0", "0B0", "0F1", "0B1")))
    second = tuple(map(parse_action, ("1F0", "1F1", "1B0", "1B1")))
    with pytest.raises(ScheduleError, match="rank 0, position 1, action 0B0: waits for ever for 1B0"):
        simulate(replace(table, actions=(first, second)), Costs())
