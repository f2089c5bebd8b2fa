"""Gradient reductions in tables: where they may stand, when they run beside the actions, and how they are written and drawn."""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.report import Picture, render_html, render_svg, render_text, render_trace
from counterflow.schedule import (
    Action,
    Costs,
    ScheduleError,
    ScheduleTable,
    add_reductions,
    build,
    build_forward_only,
    from_csv,
    lay_v,
    parse_action,
    simulate,
    to_csv,
    validate,
)
from tests.support.running import check_refusal
from tests.support.slow_schedule import any_table, run_slowly

a_cost = st.sampled_from([0.0, 0.25, 1.0, 1.5, 6.0])


@st.composite
def any_reducing(draw: st.DrawFn) -> ScheduleTable:
    """A family's table, whose reductions may stand later than they could."""
    table, later = add_reductions(draw(any_table)), draw(st.booleans())
    rows = [sorted(row, key=lambda action: action.kind == "R") if later else list(row) for row in table.actions]
    return replace(table, actions=tuple(map(tuple, rows)))


@settings(max_examples=150)
@given(any_reducing(), st.data())
def test_reductions_run_when_the_reference_says_and_hold_up_no_action(table: ScheduleTable, data: st.DataObject) -> None:
    stages = table.layout.last_stage + 1
    f, i, w, reduce = (data.draw(st.lists(a_cost, min_size=stages, max_size=stages)) for _ in range(4))
    costs = Costs(f, i, w, p2p=data.draw(st.sampled_from([0.0, 0.5])), overlap=0.75, reduce=reduce)
    validate(table)
    timeline, (actions, reductions) = simulate(table, costs), run_slowly(table, costs)
    for rank, expected in enumerate(reductions):
        ran = [(span.start, span.end) for span in timeline.reductions if span.rank == rank]
        assert ran == [pytest.approx((span.start, span.end)) for span in expected]
    assert timeline.makespan == pytest.approx(max(row[-1].end for row in (*actions, *reductions)))
    bare = simulate(build_bare(table), costs)
    assert (timeline.spans, timeline.memory) == (bare.spans, bare.memory)
    for overlaps in (True, False):
        timeline = simulate(table, replace(costs, p2p_overlaps=overlaps))
        idle = sum(wait.end - wait.start for wait in timeline.waits)
        assert math.isclose(timeline.bubble * timeline.makespan * table.ranks, idle, abs_tol=1e-9), "idle time without a reason"


@given(any_reducing())
def test_they_survive_a_file_and_cost_nothing_by_default(table: ScheduleTable) -> None:
    again = from_csv(to_csv(table))
    assert again == table and again.digest == table.digest
    assert add_reductions(table) is table
    bare = simulate(build_bare(table), Costs())
    assert simulate(table, Costs()).makespan == bare.makespan


def build_bare(table: ScheduleTable) -> ScheduleTable:
    return replace(table, actions=tuple(tuple(action for action in row if action.kind != "R") for row in table.actions))


def test_they_are_added_right_after_the_last_gradients() -> None:
    assert to_csv(add_reductions(build("zb-h1", 2, 2))).splitlines() == [
        "0F0,0F1,0I0,0W0,0I1,0W1,0REDUCE_GRAD",
        "1F0,1I0,1F1,1I1,1W0,1W1,1REDUCE_GRAD",
    ]
    pairs = add_reductions(from_csv("0F0,1F0,0F1,(1F1;1B0)OVERLAP_F_B,1B1,0B0,0B1"))
    assert to_csv(pairs).strip() == "0F0,1F0,0F1,(1F1;1B0)OVERLAP_F_B,1B1,1REDUCE_GRAD,0B0,0B1,0REDUCE_GRAD"
    evaluation = build_forward_only(lay_v(2), 4)
    assert add_reductions(evaluation) == evaluation, "evaluation has nothing to reduce"


def test_torch_writes_them_alike() -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs = schedules._Action(3, schedules.REDUCE_GRAD, None)
    assert str(theirs) == str(Action("R", 3)) == "3REDUCE_GRAD" and parse_action(str(theirs)) == Action("R", 3)
    row = [schedules._Action.from_str(str(action)) for action in build("zb-h1", 2, 3).actions[0]]
    added = [str(action) for action in schedules._add_reduce_grad(row, 3)]
    assert added == list(map(str, add_reductions(build("zb-h1", 2, 3)).actions[0]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,0I0,0REDUCE_GRAD,0W0", "rank 0, position 3, action 0W0: 0W0 comes after 0REDUCE_GRAD"),
        ("0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD", "position 3, action 0REDUCE_GRAD: 0REDUCE_GRAD comes after 0REDUCE_GRAD"),
        ("0F0,1F0,1B0,1REDUCE_GRAD,0B0", "rank 0: 0REDUCE_GRAD is missing; a table reduces every chunk, or none"),
        ("0F0,0REDUCE_GRAD", "rank 0: 0B0 is missing"),
        ("0F0,0B0,0REDUCE_GRAD1", "is not an action"),
        ("0F0,0B0,1REDUCE_GRAD", "0F0|no layout|1F0 is missing"),
        ("(0F0;0REDUCE_GRAD)OVERLAP_F_B", "an overlapped pair is an F and a B"),
    ],
)
def test_one_that_cannot_be_is_named(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        validate(from_csv(text))


def test_data_parallel_peers_of_one_table_reduce_in_one_order() -> None:
    table = add_reductions(build("dualpipe", 4, 8))
    orders = [[action.stage for action in row if action.kind == "R"] for row in table.actions]
    assert orders == orders[::-1]
    row = list(table.actions[0])
    first, second = (n for n, action in enumerate(row) if action.kind == "R")
    moved = row[:first] + row[first + 1 : second + 1] + [row[first]] + row[second + 1 :]
    with pytest.raises(ScheduleError, match=r"rank 0: reduces the gradients of stages .* rank 3, which holds the same stages"):
        validate(replace(table, actions=(tuple(moved), *table.actions[1:])))


def test_an_exposed_reduction_is_drawn_and_explained() -> None:
    table = add_reductions(build("1f1b", 2, 2))
    timeline = simulate(table, Costs(reduce=[1.5, 4.0]))
    # Rank 1 is done at 7 and reduces until 11; rank 0 is done at 9 and reduces until 10.5.
    assert [(str(span.action), span.start, span.end) for span in timeline.reductions] == [
        ("0REDUCE_GRAD", 9.0, 10.5),
        ("1REDUCE_GRAD", 7.0, 11.0),
    ]
    assert timeline.makespan == 11.0
    reasons = [(wait.rank, wait.start, wait.end, wait.reason) for wait in timeline.waits]
    assert (1, 7.0, 11.0, "waits for 1REDUCE_GRAD of rank 1") in reasons
    assert (0, 10.5, 11.0, "nothing left to do") in reasons
    picture = Picture("1f1b", table, timeline)
    svg = render_svg([picture])
    assert svg.count('class="reduction"') == 3 and "1REDUCE_GRAD, 7 to 11" in svg, "two strips and the legend's"
    text = render_text(picture, 100)
    assert "= idle, a gradient reduction runs" in text and text.splitlines()[3].rstrip().endswith("====")
    slices = [event for event in json.loads(render_trace([picture]))["traceEvents"] if event.get("cat") == "R"]
    assert [(event["tid"], event["ts"], event["dur"]) for event in slices] == [(2, 9000.0, 1500.0), (3, 7000.0, 4000.0)]
    assert "gradient reduction, beside" in render_html([picture])
    bare = Picture("1f1b", table, simulate(table, Costs()))
    assert "reduction" not in render_svg([bare]) and "=" not in render_text(bare, 100)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the search compiles")
def test_commands_take_a_cost_of_reduction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[..., str]
) -> None:
    size = "--ranks 2 --microbatches 4"

    def show(line: str, *more: object) -> float:
        found = json.loads(command(f"schedule {line} {size} --json", *more))
        return float(min(one["makespan"] for one in found) if isinstance(found, list) else found["makespan"])

    assert show("show 1f1b --reduce 5") == pytest.approx(show("show 1f1b") + 5)
    # Every rank has a chunk to reduce after all its work.
    assert show("compare --reduce 2") >= show("compare") + 1
    out = tmp_path / "found.csv"
    slow = show("search --reduce 2 --seconds 0.2", "--csv", out)
    assert slow >= show("search --seconds 0.2") + 0.9
    found = from_csv(out.read_text())
    assert all(any(action.kind == "R" for action in row) for row in found.actions)
    validate(found, training=True)
    refused = f"schedule show 1f1b {size} --reduce 1 --record {tmp_path}".split()
    check_refusal(refused, "--reduce given with a record", capsys)
