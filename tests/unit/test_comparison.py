"""A recorded step over its simulation: what lost time is named, by rank, action and cause, and nothing else is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow.schedule import (
    Costs,
    ScheduleError,
    ScheduleTable,
    Timeline,
    build,
    dump_record,
    load_record,
    parse_action,
    simulate,
)
from counterflow.schedule.comparison import BEGAN_LATE, INPUT_LATE, RAN_LONGER, Comparison, compare, estimate_costs, fit_record
from counterflow.schedule.dependencies import find_input
from counterflow.schedule.timeline import find_last_step
from tests.support.running import check_refusal
from tests.support.slow_schedule import Change, change_nothing, run_slowly

COSTS = Costs(0.02, 0.02, 0.02)


def run_on_paper(table: ScheduleTable, longer: Change = change_nothing, later: Change = change_nothing) -> Timeline:
    """A run that costs `COSTS`, some actions taking ``longer`` or beginning ``later`` than they could; starts anywhere."""
    spans, _ = run_slowly(table, COSTS, longer, later, began=1000.0)
    return Timeline(tuple(span for row in spans for span in row))


def compare_run(table: ScheduleTable, longer: Change = change_nothing, later: Change = change_nothing) -> Comparison:
    return compare(table, run_on_paper(table, longer, later), simulate(table, COSTS))


def find_loser(comparison: Comparison) -> tuple[int, str, float]:
    """Who lost most along the critical path: rank, cause and time."""
    lost: dict[tuple[int, str], float] = {}
    for parting in comparison.path:
        lost[parting.rank, parting.cause] = lost.get((parting.rank, parting.cause), 0.0) + parting.time
    (rank, cause), time = max(lost.items(), key=lambda item: item[1])
    return rank, cause, time


@pytest.fixture(params=["1f1b", "interleaved", "zbv", "dualpipev", "dualpipe"])
def table(request: pytest.FixtureRequest) -> ScheduleTable:
    return build(request.param, 4, 16)


def test_an_exact_record_parts_nowhere(table: ScheduleTable) -> None:
    found = compare_run(table)
    assert found.ratio == pytest.approx(1.0)
    assert not any(rank.partings for rank in found.ranks), "an exact record parts from its simulation"
    assert sum(abs(parting.time) for parting in found.path) < 1e-9
    assert [rank.late for rank in found.ranks] == pytest.approx([0.0] * 4, abs=1e-9)
    assert [rank.idle for rank in found.ranks] == pytest.approx([rank.simulated_idle for rank in found.ranks])


def test_a_slow_rank_is_named(table: ScheduleTable) -> None:
    found = compare_run(table, longer=lambda rank, action: 0.01 if rank == 2 else 0.0)
    rank, cause, lost = find_loser(found)
    assert (rank, cause) == (2, RAN_LONGER)
    assert lost >= found.measured.makespan - found.simulated.makespan - 1e-9, "the critical path does not explain the step's end"
    assert {parting.cause for parting in found.ranks[2].partings} >= {RAN_LONGER}
    for other in (0, 1, 3):
        assert {parting.cause for parting in found.ranks[other].partings} == {INPUT_LATE}, "a rank at full speed is blamed"
    assert 2 in {parting.source_rank for parting in found.ranks[3].partings}, "the late input's rank is not named"


def test_a_late_transfer_is_told_from_a_late_input(table: ScheduleTable) -> None:
    last_stage = table.layout.last_stage
    victim = next(a for a in table.actions[3][4:] if (n := find_input(a, last_stage)) and a.kind in "FIB" and n.microbatch > 0)
    found = compare_run(table, later=lambda rank, action: 0.005 if action == victim else 0.0)
    late = found.ranks[3].largest
    assert late is not None
    assert (late.action, late.cause) == (victim, BEGAN_LATE)
    assert late.time == pytest.approx(0.005)
    assert found.ranks[3].first == late, "a parting is named before there was one"
    others = [parting for rank in found.ranks[:3] for parting in rank.partings]
    assert {parting.cause for parting in others} <= {INPUT_LATE}


def test_transfers_that_take_what_was_allowed_are_not_late() -> None:
    table = build("1f1b", 4, 8)
    costs = replace(COSTS, p2p=0.004)
    found = compare(table, simulate(table, costs), simulate(table, costs), p2p=costs.p2p)
    assert not any(rank.partings for rank in found.ranks)
    blamed = compare(table, simulate(table, costs), simulate(table, COSTS))
    cause = {parting.cause for rank in blamed.ranks for parting in rank.partings}
    assert BEGAN_LATE in cause and RAN_LONGER not in cause


def test_one_long_action_is_named(table: ScheduleTable) -> None:
    victim = table.actions[1][7]
    found = compare_run(table, longer=lambda rank, action: 0.015 if action == victim else 0.0)
    (long,) = found.ranks[1].partings[:1]
    assert (long.position, long.action, long.cause) == (7, victim, RAN_LONGER)
    assert long.time == pytest.approx(0.015)
    blamed = {parting.action for rank in found.ranks for parting in rank.partings if parting.cause != INPUT_LATE}
    assert blamed == {victim}, "an action that took its time is blamed"


def test_costs_are_the_records_medians() -> None:
    table = build("dualpipev", 4, 16)
    stages = 8
    costs = Costs([0.01 + 0.001 * s for s in range(stages)], 0.02, [0.005] * stages, overlap=0.75).spread(stages)
    assert estimate_costs(table, simulate(table, costs)).overlap == pytest.approx(0.75)
    found = estimate_costs(table, simulate(table, costs), w=0.004)
    assert (found.f, found.i, found.w) == (pytest.approx(costs.f), pytest.approx(costs.i), (0.004,) * stages)
    expected = estimate_costs(table, simulate(table, costs), f=0.005, i=0.01, w=0.0025)
    assert expected.overlap == pytest.approx(0.75), "pairs that are slow like their parts count as badly overlapped"
    whole = build("1f1b", 4, 8)
    found = estimate_costs(whole, simulate(whole, Costs(1.0, 1.0, 2.0)))
    assert (found.i, found.w) == ((3.0,) * 4, (0.0,) * 4)


def test_a_record_of_whole_backwards_fits_a_split_table() -> None:
    table = build("zbv", 4, 8)
    whole = tuple(span for span in simulate(table, COSTS).spans if span.action.kind != "W")
    ran, measured = fit_record(table, Timeline(whole))
    assert {single.kind for rank in range(4) for single in ran.singles(rank)} == {"F", "B"}
    simulated = simulate(ran, estimate_costs(ran, measured))
    assert simulated.peak_queued == (0.0,) * 4 == measured.peak_queued


@pytest.mark.parametrize(
    ("ranks", "microbatches", "said"),
    [
        (4, 7, "rank 0, position 11: 0F7 is recorded, the table has 0B4: give the schedule"),
        (2, 8, "rank 3 is recorded, the table has ranks 0 to 1"),
        (5, 8, "rank 0, position 4: 0B0 is recorded, the table has 0F4"),
    ],
)
def test_a_record_of_another_table_is_refused(ranks: int, microbatches: int, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        fit_record(build("1f1b", ranks, microbatches), simulate(build("1f1b", 4, 8), COSTS))


def test_a_record_that_ends_early_is_refused() -> None:
    table = build("1f1b", 4, 8)
    whole = simulate(table, COSTS)
    with pytest.raises(ScheduleError, match="rank 3: 15 actions are recorded, the table has 16"):
        fit_record(table, Timeline(whole.spans[:-1]))


def write_record(directory: Path, step: int, timeline: Timeline, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    for rank in ranks:
        spans = [span for span in timeline.spans if span.rank == rank]
        with (directory / f"timeline-rank{rank:05d}.jsonl").open("a") as file:
            file.write(dump_record(step, "dualpipev", 0, rank, spans) + "\n")


def test_the_last_step_of_all_ranks_is_found_and_a_resumed_step_replaces_the_first(tmp_path: Path) -> None:
    table = build("dualpipev", 4, 8)
    write_record(tmp_path, 1, run_on_paper(table))
    write_record(tmp_path, 2, run_on_paper(table, longer=lambda *_: 1.0))
    write_record(tmp_path, 2, run_on_paper(table))
    write_record(tmp_path, 3, run_on_paper(table), ranks=(0, 1))  # the run was killed here
    assert find_last_step(tmp_path) == 2
    assert load_record(tmp_path, 2).makespan == pytest.approx(simulate(table, COSTS).makespan)
    with pytest.raises(ScheduleError, match="no recorded step of pipeline 7"):
        find_last_step(tmp_path, 7)


def test_show_lays_a_record_over_its_simulation(tmp_path: Path, command: Callable[..., str]) -> None:
    victim = parse_action("3F2")
    table = build("dualpipev", 4, 8)
    write_record(tmp_path, 5, run_on_paper(table, longer=lambda rank, action: 0.0125 if action == victim else 0.0))
    page, picture, trace = (tmp_path / name for name in ("r.html", "r.svg", "r.json"))
    show = "schedule show dualpipev --ranks 4 --microbatches 8 --record"
    out = command(show, tmp_path, "--html", page, "--svg", picture, "--trace", trace)
    assert "measured (step 5)" in out and "costs per stage in ms: F 20.00; I 20.00; W 20.00" in out
    assert "3F2 ran 12.5 ms longer than its cost" in out
    assert "rank 3 ran longer: 12.5 ms" in out
    for path in (page, picture, trace):
        text = path.read_text()
        assert "dualpipev: simulated" in text and "dualpipev: measured (step 5)" in text
    figures = json.loads(command(show, tmp_path, *"--json --step 5 --f 0.02".split()))
    assert figures["ratio"] > 1.0 and figures["ranks"][3]["partings"][0]["action"] == "3F2"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--step", "3"], "--step 3 given without a record; add --record DIR or drop --step"),
        (["--record", "{tmp}/none"], "no recorded step of pipeline 0; record with --cf-record DIR"),
        (["--record", "{tmp}", "--step", "9"], "no recorded spans of step 9, pipeline 0"),
        (["--record", "{tmp}"], "step 1, and 1f1b do not fit: rank 0, position 4: 0F4 is recorded, the table has 0B0"),
    ],
)
def test_bad_input_gets_one_line(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, 1, run_on_paper(build("dualpipev", 4, 8)))
    show = "schedule show 1f1b --ranks 4 --microbatches 8".split()
    check_refusal([*show, *(part.format(tmp=tmp_path) for part in argv)], said, capsys)


def test_a_record_with_pairs_that_the_table_lacks_names_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path, 1, run_on_paper(build("interleaved", 2, 8, ep_overlap=True)))
    show = "schedule show interleaved --ranks 2 --microbatches 8 --record".split()
    check_refusal([*show, str(tmp_path)], "it ran with --cf-overlap: add --ep-overlap", capsys)
