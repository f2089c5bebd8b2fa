"""Steps are counted as the trainer counts them: after a resume, when a step runs again, while the model is evaluated."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from megatron.training import global_vars

from counterflow.megatron.experts.balancing import ExpertBalancer
from counterflow.megatron.loop import number_iteration
from counterflow.options import Options
from counterflow.runtime.recorder import append_record
from counterflow.runtime.watch import Watch
from counterflow.schedule import build, load_record, simulate
from counterflow.schedule.costs import Costs
from counterflow.schedule.timeline import find_last_step


def set_trainer(monkeypatch: pytest.MonkeyPatch, **args: Any) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", SimpleNamespace(cf_platform="cpu", **args) if args else None)


def test_where_megatron_trains_its_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_trainer(monkeypatch, curr_iteration=6, iteration=6)
    assert number_iteration(0) == 7, "the first step of a run that resumed at 6"
    assert number_iteration(0) == number_iteration(1) == 7, "a step that runs again is another"
    assert number_iteration(2, forward_only=True) == 7


def test_evaluation_before_a_step_comes_after_those_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    set_trainer(monkeypatch, iteration=6)
    assert number_iteration(0, forward_only=True) == 6
    set_trainer(monkeypatch, iteration=0, curr_iteration=0)
    assert number_iteration(0, forward_only=True) == 0


@pytest.mark.parametrize("is_loaded", [True, False])
def test_another_loop_counts_for_itself(monkeypatch: pytest.MonkeyPatch, is_loaded: bool) -> None:
    set_trainer(monkeypatch)
    if not is_loaded:
        monkeypatch.delitem(sys.modules, "megatron.training.global_vars")
    assert [number_iteration(done) for done in range(3)] == [1, 2, 3]
    assert [number_iteration(done, forward_only=True) for done in range(3)] == [0, 1, 2]


def test_balancing_counts_with_and_without_megatrons_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    balancer = ExpertBalancer(Options(eplb=True))
    balancer._is_attached = True
    balancer.layers = SimpleNamespace(begin_step=lambda step, microbatches: begun.append(step))  # type: ignore[assignment]
    monkeypatch.setattr(balancer, "end_step", lambda microbatches, measured: None)
    run = balancer.wrap_schedule(lambda **kwargs: None)
    set_trainer(monkeypatch)
    for _ in range(2):
        run(model=[], num_microbatches=1)
    set_trainer(monkeypatch, curr_iteration=6)
    run(model=[], num_microbatches=1)
    assert begun == [1, 2, 7]


def test_a_stalled_evaluation_is_told_from_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    for is_evaluation, where in ((True, "(evaluation after step 12, position 0)"), (False, "(step 12, position 0)")):
        watch = Watch(dist.HashStore(), [0], 0, 10.0)
        watch.begin(12, is_evaluation=is_evaluation)
        assert where in str(watch.explain(RuntimeError("late")))


def record(directory: Path, step: int, ranks: int, pipeline_ranks: list[int], scale: float = 1.0) -> None:
    table = build("1f1b", ranks, 4)
    spans = simulate(table, Costs(f=scale, i=scale, w=scale)).spans
    for rank in range(ranks):
        append_record(directory, pipeline_ranks, rank, step, table.name, [span for span in spans if span.rank == rank])


def test_steps_after_a_resume_replace_those_before_it(tmp_path: Path) -> None:
    for step in range(1, 10):
        record(tmp_path, step, 2, [0, 1])
    path = tmp_path / "timeline-rank00001.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # killed while it wrote step 9
    assert find_last_step(tmp_path) == 8
    for step in (7, 8, 9, 10):
        record(tmp_path, step, 2, [0, 1], scale=2.0)
    assert find_last_step(tmp_path) == 10
    lengths = {step: load_record(tmp_path, step).makespan for step in range(1, 11)}
    assert [round(lengths[step] / lengths[1]) for step in range(1, 11)] == [1] * 6 + [2] * 4


def test_a_rank_that_has_another_place_after_a_resume_is_not_taken_for_two(tmp_path: Path) -> None:
    record(tmp_path, 7, 4, [0, 1, 2, 3])
    record(tmp_path, 7, 2, [0, 2])
    record(tmp_path, 7, 2, [1, 3])
    for pipeline in (0, 1):
        assert load_record(tmp_path, 7, pipeline).ranks == 2
        assert find_last_step(tmp_path, pipeline) == 7
