"""What a DeepSpeed run under a schedule shows: the record of its steps, and DeepSpeed's own monitor."""

import csv
from pathlib import Path
from typing import Any

import pytest

from counterflow.analysis import analyze_trace, read_traces
from counterflow.analysis.chunks import find_costs
from counterflow.schedule.timeline import find_last_step, load_record
from tests.distributed.test_deepspeed import SEEDS, STEPS, make_case, run_cases
from tests.support.comparing import assert_same_steps

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    cases = {}
    for name, section in (
        ("plain", None),
        ("dualpipev", {"schedule": "dualpipev", "profile": "3:4"}),
        ("auto", {"schedule": "auto"}),
    ):
        monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "monitor"), "job_name": name}}
        more = {} if section is None else {"counterflow": section | {"record": str(folder / name)}}
        cases[name] = make_case("dense", None, SEEDS[0], **monitor, **more)
    return run_cases(cases, folder)


@pytest.mark.parametrize("name", ["dualpipev", "auto"])
def test_every_step_is_recorded_and_trains_as_without(runs: dict[str, Any], folder: Path, name: str) -> None:
    assert_same_steps(runs[name], runs["plain"])
    # Two pipelines, one a replica.
    assert [find_last_step(folder / name, pipeline) for pipeline in (0, 1)] == [STEPS, STEPS]
    timeline = load_record(folder / name, STEPS)
    singles = [(span.rank, single) for span in timeline.spans for single in span.action.singles()]
    forwards = sorted((rank, str(single)) for rank, single in singles if single.kind == "F")
    assert forwards == sorted((min(stage, 3 - stage), f"{stage}F{one}") for stage in range(4) for one in range(4))
    assert timeline.makespan > 0


def test_profiled_steps_have_their_actions(runs: dict[str, Any], folder: Path) -> None:
    devices = [device for trace in read_traces(folder / "dualpipev") for device in analyze_trace(trace)]
    assert len(devices) == 4, "a trace per rank"
    for device in devices:
        assert device.trace.steps == {"3", "4"}
        done = sorted(str(single) for span in device.trace.timeline.spans for single in span.action.singles())
        stages = (0, 3) if "0F0" in done else (1, 2)
        # Of several steps the timeline has the last.
        assert [one for one in done if "F" in one] == [f"{stage}F{number}" for stage in stages for number in range(4)]
        assert all(phase.compute > 0 for phase in device.phases if phase.name != "(none)")
    costs = find_costs(devices, "")
    assert all(len(costs[kind]) == 4 and min(costs[kind]) > 0 for kind in ("f", "i"))


def test_the_monitor_has_the_losses_of_plain_deepspeed(runs: dict[str, Any], folder: Path) -> None:
    files = [path.relative_to(folder / "monitor" / "plain") for path in (folder / "monitor" / "plain").rglob("*.csv")]
    assert files, "the monitor wrote nothing"
    for file in files:
        plain, mine = (list(csv.reader((folder / "monitor" / name / file).open())) for name in ("plain", "dualpipev"))
        assert len(plain) == len(mine) > 1
        for theirs, ours in zip(plain[1:], mine[1:], strict=True):
            assert [float(one) for one in ours] == pytest.approx([float(one) for one in theirs], rel=1e-5)
