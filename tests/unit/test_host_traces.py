"""Traces of CPU runs: actions by their annotations, operators and collectives laid out as lanes."""

from pathlib import Path

import pytest

from counterflow.analysis import Device, analyze_trace, read_trace, read_traces
from counterflow.analysis.chunks import find_costs
from counterflow.analysis.intervals import intersect, subtract, unite
from counterflow.analysis.transfers import measure_transfer
from counterflow.errors import TraceError
from counterflow.schedule import Costs, build, pair, parse_action, simulate
from counterflow.schedule.annotations import Annotation, name_phase, read_annotation
from tests.support.made_trace import EPOCH, Event, make_range, write_trace
from tests.support.running import refuses


def make_operator(name: str, start: float, length: float, thread: int = 1) -> Event:
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 9, "tid": thread, "ts": start, "dur": length, "args": {}}


def note(action: str, start: float, length: float, rank: int = 0, step: int = 4) -> Event:
    return make_range(str(Annotation(step, 0, rank, parse_action(action))), start, length)


def analyze(path: Path) -> Device:
    (trace,) = read_traces(path)
    (device,) = analyze_trace(trace)
    return device


def test_annotations_are_read_as_written() -> None:
    both = pair(parse_action("0F5"), parse_action("3B1"))
    for action in (parse_action("2I7"), both):
        noted = Annotation(12, 8, 3, action)
        assert read_annotation(str(noted)) == noted
    for other in ("counterflow step 1 pipeline 0 rank 0: 9X9", "counterflow", "stage 0 (F)", ""):
        assert read_annotation(other) is None
    assert [name_phase(kind, 2) for kind in "FIBW"] == ["stage 2 (F)", "stage 2 (B)", "stage 2 (B)", "stage 2 (W)"]


def test_what_computes_and_what_waits(tmp_path: Path) -> None:
    events = [
        note("0F0", EPOCH, 100), note("0B0", EPOCH + 120, 80),
        make_operator("MoE", EPOCH, 100), make_operator("aten::mm", EPOCH, 20), make_operator("c10d::alltoall", EPOCH + 25, 5),
        make_range("gloo:all_to_all", EPOCH + 30, 50, thread=2), make_operator("aten::add", EPOCH + 35, 10, thread=3),
        make_range("gloo:recv", EPOCH + 90, 60, thread=2),
    ]  # fmt: skip
    device = analyze(write_trace(tmp_path / "t.json", events, distributedInfo={"rank": 5, "world_size": 8}))
    # The F waits from 30 to 80 but for the operator of another thread. The receive is exposed between the actions.
    assert device.compute.length == (30 + 10 + 20 + 80) * 1000
    assert device.kinds["all_to_all"].exposed == 40_000
    assert device.kinds["send_recv"].exposed == 20_000
    assert {phase.name: phase.compute for phase in device.phases} == {"stage 0 (F)": 60_000, "stage 0 (B)": 80_000}
    assert (device.trace.rank, device.trace.form, device.window) == (5, "host", 200_000)


def test_layers_of_actions(tmp_path: Path) -> None:
    """Two layers of an F; a collective runs while the other part of a pair has its layer open, and is its issuer's."""
    events = [
        note("(0F0;1B0)OVERLAP_F_B", EPOCH, 200),
        make_range("counterflow layer 1 (F)", EPOCH + 10, 40), make_operator("aten::mm", EPOCH + 10, 30),
        make_operator("c10d::alltoall_base_", EPOCH + 45, 4), make_range("gloo:all_to_all", EPOCH + 52, 70, thread=5),
        make_range("counterflow layer 7 (B)", EPOCH + 51, 99, thread=2), make_operator("aten::mm", EPOCH + 60, 20, thread=2),
        make_range("gloo:recv", EPOCH + 55, 100, thread=5), make_range("counterflow layer 1 (F)", EPOCH + 150, 20),
    ]  # fmt: skip
    device = analyze(write_trace(tmp_path / "t.json", events))
    found = {(one.name, one.part): (one.compute, one.communication, one.exposed) for one in device.layers}
    # Of layer 7 from 52 to 122 only the operator from 60 to 80 computes.
    assert found == {("1", "F"): (60_000, 70_000, 50_000), ("7", "B"): (1000 + 20_000 + 28_000, 0, 0)}
    assert device.compute.length == (200 - 70 + 20) * 1000


def test_a_cpu_trace_without_our_annotations_is_refused(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.json", [make_operator("aten::mm", EPOCH, 20), make_range("forward", EPOCH, 30)])
    with refuses("no GPU kernels", TraceError):
        read_traces(path)
    with refuses("no GPU kernels", TraceError):
        read_trace(write_trace(tmp_path / "u.json", [note("0F0", EPOCH, 100)]))


@pytest.mark.parametrize("name", ["dualpipev", "zbv", "1f1b"])
def test_costs_are_found_again(name: str, tmp_path: Path) -> None:
    table = build(name, 2, 6)
    stages = table.layout.last_stage + 1
    given = Costs([10.0 + stage for stage in range(stages)], 12.0, 6.0, p2p=1.5, overlap=0.8).spread(stages)
    for rank in range(2):
        spans = [span for span in simulate(table, given).spans if span.rank == rank]
        events = [note(str(span.action), EPOCH + 1000 * span.start, 1000 * (span.end - span.start), rank) for span in spans]
        write_trace(tmp_path / f"profile-rank0000{rank}.json.gz", events, distributedInfo={"rank": rank})
    devices = [device for trace in read_traces(tmp_path) for device in analyze_trace(trace)]
    costs = find_costs(devices, "")
    assert costs["f"] == pytest.approx(given.f, abs=1e-3) and costs["p2p"] == pytest.approx(1.5, abs=1e-3)
    # Without I's, whole backward passes are all that is known.
    assert [i + w for i, w in zip(costs["i"], costs["w"], strict=True)] == pytest.approx([18.0] * stages, abs=1e-3)
    assert costs["overlap"] == pytest.approx(0.8 if name == "dualpipev" else 1.0, abs=1e-3)


def test_transfers_are_measured_where_a_rank_waited() -> None:
    spans = simulate(build("1f1b", 4, 8), Costs(p2p=0.25)).spans
    assert measure_transfer(spans) == pytest.approx(0.25)
    assert measure_transfer([]) == 0


def test_sets_of_intervals() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    for _ in range(50):
        unions, marks = [], []
        for _ in range(2):
            starts = random.integers(0, 50, 6)
            ends = starts + random.integers(0, 12, 6)
            unions.append(unite(starts, ends))
            marks.append(np.array([((starts <= t) & (t < ends)).any() for t in range(70)]))
        one, two = unions
        for found, expected in ((subtract(one, two), marks[0] & ~marks[1]), (intersect(one, two), marks[0] & marks[1])):
            drawn = np.zeros(70, bool)
            for start, end in zip(found.starts, found.ends, strict=True):
                drawn[start:end] = True
            assert (drawn == expected).all()
