"""What ``analyze`` prints behind a gain can be typed: the flags pass the checks and run the table whose step was promised."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.analysis import analyze_trace, read_trace, read_traces
from counterflow.analysis.alternatives import MICROBATCHES, RANKS, Alternatives, list_alternatives
from counterflow.analysis.cluster import compare_ranks
from counterflow.analysis.gains import list_cluster_gains, list_gains, name_schedule_gain
from counterflow.megatron.checks import count_chunks, prepare_arguments
from counterflow.options import Options, add_flags, merge_options, read_flags
from counterflow.report import Picture
from counterflow.report.trace import render_trace
from counterflow.schedule import Costs, ScheduleTable, Timeline, build, simulate
from counterflow.schedule.reductions import drop_reductions
from counterflow.trainer.tables import build_table
from tests.megatron.test_checks import make_arguments
from tests.support.made_trace import EPOCH, make_kernel, make_launch, make_range, write_trace
from tests.unit.test_analyze_cli import make_rank

COSTS = Costs(3.0, 4.0, 2.0, overlap=0.8)


def parse(flags: str, ranks: int, microbatches: int) -> tuple[Options, Any]:
    """Return the options, and Megatron's arguments after this plugin's checks; every word must be a flag's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-virtual-stages-per-pipeline-rank", type=int)
    words = shlex.split(flags)
    given = add_flags(parser).parse_args(words)
    options = merge_options(read_flags(words))
    args = make_arguments(
        world_size=2 * ranks,
        pipeline_model_parallel_size=ranks,
        num_layers=2 * ranks,
        global_batch_size=2 * microbatches,
        num_virtual_stages_per_pipeline_rank=given.num_virtual_stages_per_pipeline_rank,
    )
    prepare_arguments(args, options)
    return options, args


def make_window(path: Path, overlap: float) -> Path:
    """Write a pair's kernels: parts of 30, 40 and 20 ms, the window as much shorter than their sum as they overlap."""
    events, begin = [], EPOCH
    for number, (name, length) in enumerate((("mlp(F)", 30_000), ("mlp(B)", 40_000), ("mlp(W)", 20_000)), start=1):
        at = EPOCH + 1000 * number
        events += [make_range(name, at, 900), make_launch(number, at + 10)]
        events.append(make_kernel("gemm", begin, length, number, correlation=number))
        begin += overlap * length
    return write_trace(path, events)


def find_alternatives(path: Path) -> Alternatives:
    devices = [device for trace in read_traces(path) for device in analyze_trace(trace)]
    found = list_alternatives(devices)
    assert found is not None
    return found


@pytest.mark.parametrize("overlap", [1.0, 0.5])
def test_every_schedule_runs_by_its_flags_as_it_was_simulated(overlap: float, tmp_path: Path) -> None:
    found = find_alternatives(make_window(tmp_path / "t.json", overlap))
    assert (found.ranks, found.microbatches, found.is_known) == (RANKS, MICROBATCHES, False)
    assert found.base.title == ("1f1b" if overlap == 1.0 else found.base.title) and found.base.has_pairs == (overlap < 1)
    (device,) = analyze_trace(read_trace(tmp_path / "t.json"))
    factor = device.window / 90e6
    for one in found.steps:
        options, args = parse(one.flags, RANKS, MICROBATCHES)
        table = drop_reductions(build_table(options, RANKS, MICROBATCHES, count_chunks(args, RANKS) or 1))
        has_pairs = options.overlap and any(action.parts for row in table.actions for action in row)
        assert has_pairs == one.has_pairs
        share = 2 if table.layout.chunks == 1 else 1
        costs = Costs(30.0 * share, 40.0 * share, 20.0 * share, overlap=factor if has_pairs else 1.0)
        assert one.step == pytest.approx(simulate(table, costs).makespan, rel=1e-5), one


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_a_run_of_actions_is_compared_on_its_own_pipeline(name: str, tmp_path: Path) -> None:
    table = build(name, 4, 8)
    timeline = simulate(table, replace(COSTS, overlap=1.0).spread(table.layout.last_stage + 1))
    found = find_alternatives(write_simulated(tmp_path / "s.json", table, timeline))
    assert (found.ranks, found.microbatches, found.is_known, found.base.title) == (4, 8, True, name)
    assert found.base.step == pytest.approx(timeline.makespan)


def write_simulated(path: Path, table: ScheduleTable, timeline: Timeline) -> Path:
    path.write_text(render_trace([Picture("step", table, timeline)]))
    return path


def test_stages_of_other_schedules_keep_their_parts_of_the_model(tmp_path: Path) -> None:
    table = build("zbv", 2, 8)
    uneven = Costs([1.0, 4.0, 10.0, 18.0], [3.0, 3.0, 3.0, 8.0], [2.0, 0.5, 0.5, 0.5])
    found = find_alternatives(write_simulated(tmp_path / "s.json", table, simulate(table, uneven)))
    steps = {one.title: one.step for one in found.steps}
    merged = Costs([5.0, 28.0], [6.0, 11.0], [2.5, 1.0])
    assert steps["1f1b"] == pytest.approx(simulate(build("1f1b", 2, 8), merged).makespan)
    assert steps["interleaved"] == pytest.approx(simulate(build("interleaved", 2, 8), uneven).makespan)
    straight = build("1f1b", 2, 8)
    found = find_alternatives(write_simulated(tmp_path / "t.json", straight, simulate(straight, merged)))
    halves = Costs([2.5, 2.5, 14.0, 14.0], [3.0, 3.0, 5.5, 5.5], [1.25, 1.25, 0.5, 0.5])
    assert {one.title: one.step for one in found.steps}["interleaved"] == pytest.approx(
        simulate(build("interleaved", 2, 8), replace(halves, i=[4.25, 4.25, 6.0, 6.0], w=0.0)).makespan
    )


def test_full_dualpipe_is_not_compared(tmp_path: Path) -> None:
    table = build("dualpipe", 4, 8)
    timeline = simulate(table, COSTS.spread(table.layout.last_stage + 1))
    path = write_simulated(tmp_path / "s.json", table, timeline)
    assert list_alternatives([device for trace in read_traces(path) for device in analyze_trace(trace)]) is None


def test_the_flags_of_all_gains_are_flags(tmp_path: Path) -> None:
    path = make_window(tmp_path / "t.json", 0.5)
    notify, dispatch = "void deep_ep::internode::cached_notify<8>(int)", "void deep_ep::internode::dispatch<8>(int)"
    other = write_trace(
        tmp_path / "u.json", [make_kernel(n, EPOCH + 50 * k, 20) for k, n in enumerate(("gemm", notify, dispatch))]
    )
    devices = [device for one in (path, other) for device in analyze_trace(read_trace(one))]
    ranks = [analyze_trace(read_trace(make_rank(number, 100 * number, 50 * (1 + number), tmp_path)))[0] for number in range(2)]
    gains = [gain for device in devices for gain in list_gains(device)] + list_cluster_gains(compare_ranks(ranks))
    schedule = name_schedule_gain(list_alternatives(devices[:1]), devices[0].window)
    assert schedule is not None and "--cf-schedule" in schedule.hint
    hints = {gain.hint for gain in (*gains, schedule) if gain.hint}
    assert len(hints) >= 3
    for hint in hints:
        read_flags(shlex.split(hint))
        assert shlex.split(hint)[0].startswith("--cf-")
