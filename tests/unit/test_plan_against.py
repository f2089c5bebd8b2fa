"""A plan beside a measurement: causes are told apart by kernels and process groups, and nothing counts twice."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from counterflow.errors import CounterflowError
from counterflow.planner.against import compare_measured
from counterflow.planner.config import parse_config
from counterflow.planner.estimate import Estimate, estimate_config
from counterflow.planner.layouts import build_table
from counterflow.report.picture import Picture
from counterflow.report.trace import render_trace
from counterflow.schedule import simulate
from tests.support.made_trace import COMPUTE, EPOCH, make_kernel, write_trace
from tests.support.running import run_command

PLAN: dict[str, Any] = {
    "model": {
        "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_experts": 16, "moe_router_topk": 2,
        "moe_ffn_hidden_size": 1024, "swiglu": True, "vocab_size": 32000,
    },
    "cluster": {"gpu": "H100", "gpus": 16},
    "training": {"seq_length": 4096, "global_batch_size": 64, "precision": "bf16"},
    "layout": {"tp": 2, "pp": 4, "ep": 4, "micro_batch_size": 1, "schedule": "zbv"},
}  # fmt: skip
DISPATCH = "void deep_ep::internode::dispatch<false, 8>(int4*, nvshmem_team_t)"
NCCL = "ncclDevKernel_{}_RING_LL(ncclDevComm*, unsigned long)"


def make_estimate(**layout: Any) -> Estimate:
    return estimate_config(parse_config({**PLAN, "layout": {**PLAN["layout"], **layout}}))


def simulate_own(estimate: Estimate, tmp_path: Path) -> Path:
    """Write the simulation of an estimate's own table as a trace, its seconds as milliseconds of the trace."""
    table = build_table(estimate.plan.layout, estimate.plan.microbatches)
    timeline = simulate(table, replace(estimate.step.costs, reduce=0.0))
    scaled = replace(timeline, spans=tuple(replace(one, start=1e3 * one.start, end=1e3 * one.end) for one in timeline.spans))
    path = tmp_path / "own.json"
    path.write_text(render_trace([Picture("own", table, scaled)]))
    return path


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_a_run_as_predicted_is_measured_as_predicted(schedule: str, tmp_path: Path) -> None:
    estimate = make_estimate(schedule=schedule)
    found = compare_measured(estimate, simulate_own(estimate, tmp_path))
    causes = {one.cause: one for one in found.causes}
    bubble, makespan = estimate.step.causes["bubble"], estimate.step.makespan - estimate.step.causes["gradient reduction"]
    assert causes["step"].measured == pytest.approx(makespan, rel=1e-4)
    assert causes["bubble"].measured == pytest.approx(bubble, abs=1e-3 * makespan) and causes["bubble"].predicted == bubble
    assert sum(one.measured or 0.0 for one in found.causes[1:]) == pytest.approx(causes["step"].measured)
    for one in found.chunks:
        assert one.measured == pytest.approx(one.predicted, rel=2e-3), one.cause


@pytest.mark.parametrize(("layout", "said"), [
    ({"schedule": "zbv"}, None), ({"schedule": "dualpipe", "pp": 2, "ep": 2}, None),
    ({"schedule": "1f1b"}, "8 stages, 4 planned"), ({"pp": 2, "ep": 2}, "4 pipeline ranks, 2 planned"),
    ({"micro_batch_size": 2}, "32 micro-batches, 16 planned"),
])  # fmt: skip
def test_a_measurement_of_another_run_is_said(layout: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    planned = make_estimate(**layout)
    found = compare_measured(planned, simulate_own(planned if said is None else make_estimate(), tmp_path))
    assert (said is None and not found.warning) or (said is not None and said in found.warning), found.warning


def make_step(path: Path, rows: Sequence[tuple[str, float, float, str | None]], rank: int = 0, late: float = 0.0) -> Path:
    """Write a trace of kernels (name, start, end in microseconds, description of the process group)."""
    events = [
        make_kernel(name, EPOCH + start, end - start + (late if name == DISPATCH else 0.0), 7 + number % 2,
                    **({"Process Group Name": "3", "Process Group Description": group} if group else {}))
        for number, (name, start, end, group) in enumerate(rows)
    ]  # fmt: skip
    return write_trace(path, events, distributedInfo={"rank": rank, "world_size": 16})


def test_exposed_communication_is_told_apart_by_kernel_and_group(tmp_path: Path) -> None:
    rows = [
        (COMPUTE[0], 0, 100, None),
        (DISPATCH, 80, 130, None),  # 30 exposed
        (NCCL.format("AllGather"), 120, 150, "TENSOR_MODEL_PARALLEL_GROUP"),  # 20, 10 lie in the dispatch
        (NCCL.format("ReduceScatter"), 150, 170, "DATA_PARALLEL_GROUP_WITH_CP"),  # 20
        (NCCL.format("AllGather"), 170, 175, "EXPERT_DATA_PARALLEL_GROUP"),  # 5, of DP too
        (NCCL.format("SendRecv"), 175, 185, "PIPELINE_MODEL_PARALLEL_GROUP"),  # 10 of the bubble
        ("multi_tensor_apply_kernel<AdamFunctor>", 195, 200, None),  # after 10 in which nothing runs
    ]
    found = compare_measured(make_estimate(), make_step(tmp_path / "step.json", rows))
    measured = {one.cause: round(1e6 * one.measured) for one in found.causes if one.measured is not None}
    wanted = {"step": 200, "compute": 100, "optimizer": 5, "exposed EP": 30, "exposed TP": 20, "exposed DP": 25, "bubble": 20}
    assert {name: time for name, time in measured.items() if time} == wanted
    assert any("1 of 4 pipeline ranks" in note for note in found.notes)


def test_collectives_without_a_group_are_one_row_unless_the_sizes_tell(tmp_path: Path) -> None:
    path = make_step(tmp_path / "step.json", [(COMPUTE[0], 0, 100, None), (NCCL.format("AllGather"), 100, 150, None)])
    found = compare_measured(make_estimate(), path)
    other = next(one for one in found.causes if one.cause == "other collectives")
    assert other.measured == pytest.approx(50e-6) and any("are one row" in note for note in found.notes)
    causes = {one.cause for one in compare_measured(make_estimate(tp=1), path).causes}
    assert "exposed DP" in causes and "other collectives" not in causes


def test_what_ranks_wait_for_each_other_in_exchanges_is_imbalance(tmp_path: Path) -> None:
    rows = [(COMPUTE[0], 0, 100, None), (DISPATCH, 100, 130, None), (COMPUTE[1], 150, 160, None)]
    folder = tmp_path / "ranks"
    folder.mkdir()
    for rank, late in ((0, 0.0), (1, 10.0)):
        make_step(folder / f"profile-rank{rank:05}.json", rows, rank, late)
    for file in folder.glob("*.json"):
        import gzip

        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    measured = {one.cause: one.measured for one in compare_measured(make_estimate(), folder).causes}
    assert measured["imbalance"] == pytest.approx(5e-6) and measured["exposed EP"] == pytest.approx(30e-6)


def test_explain_prints_both_and_their_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "plan.yaml", tmp_path / "page.html"
    path.write_text(yaml.safe_dump(PLAN))
    trace = simulate_own(make_estimate(), tmp_path)
    code, out, err = run_command(["plan", "explain", str(path), "--against", str(trace), "--html", str(page)], capsys)
    assert (code, err) == (0, "") and "predicted" in out and "forward of a chunk" in out
    assert "Beside the measurement" in page.read_text()
    code, out, _ = run_command(["plan", "explain", str(path), "--against", str(trace), "--json"], capsys)
    assert {"step", "compute", "bubble"} <= {one["cause"] for one in json.loads(out)["against"]}


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(CounterflowError, match="empty.json"):
        compare_measured(make_estimate(), tmp_path / "empty.json")
