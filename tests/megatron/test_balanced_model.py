"""A rank's balanced layers from step to step: one layer on one rank, whose planner only notes what it is given."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from counterflow.balance.files.recorded import read_record
from counterflow.errors import BalanceError
from counterflow.megatron import state
from counterflow.megatron.experts import balanced_model, balancing
from counterflow.megatron.experts.balanced_model import BalancedModel
from counterflow.megatron.experts.balancing import ExpertBalancer
from counterflow.megatron.experts.layer import MegatronSlots
from counterflow.moe.planning import ClonePlanner, HomeGate
from counterflow.options import Options
from counterflow.platform import install_cpu
from counterflow.trainer.balancing_log import end_step


@pytest.fixture
def group(alone: dist.ProcessGroup) -> Iterator[Any]:
    patches = install_cpu()
    yield alone
    patches.undo()


class Planner:
    """Has a plan, the placement as it is, whenever it was started."""

    def __init__(self, model: BalancedModel) -> None:
        self._model, self.started, self.taken = model, [], 0

    def start(self, counts: Any, microbatches: int, placement: Any) -> None:
        self.started.append(counts)

    def take(self) -> Any:
        self.taken += 1
        return self._model._placement


def make_layer(group: Any, clones_per_rank: int = 0, number: int = 1) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.experts = SimpleNamespace(local_experts=[torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    layer.token_dispatcher = SimpleNamespace(tp_ep_group=group, tp_size=1)
    layer.config = SimpleNamespace(num_moe_experts=2, num_layers=1)
    layer.ep_group, layer.num_local_experts, layer.layer_number, layer.is_mtp_layer = group, 2, number, False
    state.layer_slots[layer] = MegatronSlots(layer, layer.token_dispatcher, None, clones_per_rank, is_exact=False)
    return layer


def make_model(
    monkeypatch: pytest.MonkeyPatch, group: Any, options: Options, layers: int = 1
) -> tuple[BalancedModel, MegatronSlots]:
    for name in ("get_tensor_and_data_parallel_group", "get_expert_data_parallel_group"):
        monkeypatch.setattr(balanced_model.parallel_state, name, lambda **kwargs: group)
    chunk = torch.nn.Sequential(*(make_layer(group, number=number) for number in range(1, layers + 1)))
    layer = chunk[0]
    model = BalancedModel(options, [chunk])
    model._planner = Planner(model)  # type: ignore[assignment]
    return model, state.layer_slots[layer]


def run_step(model: BalancedModel, slots: MegatronSlots, step: int) -> None:
    model.begin_step(step)
    slots.deal(torch.ones(step, 2), torch.ones(step, 2, dtype=torch.bool))
    model.end_step(1)


def test_every_step_is_recorded_whatever_the_interval(monkeypatch: pytest.MonkeyPatch, group: Any, tmp_path: Path) -> None:
    options = Options(eplb=True, eplb_clones_per_rank=0, eplb_rehome_interval=6, eplb_interval=3, record=tmp_path)
    model, slots = make_model(monkeypatch, group, options)
    for step in range(1, 6):
        run_step(model, slots, step)
    record = read_record(tmp_path)
    assert record.steps.tolist() == [1, 2, 3, 4, 5]
    assert record.counts[:, 0].tolist() == [[step, step] for step in range(1, 6)]
    assert [len(counts) for counts in model._planner.started] == [3]  # type: ignore[attr-defined]


def test_a_step_that_runs_again_keeps_its_placement_and_counts_once(
    monkeypatch: pytest.MonkeyPatch, group: Any, tmp_path: Path
) -> None:
    # Megatron runs a step again when a loss looks wrong, and takes other bits for a faulty device.
    options = Options(eplb=True, eplb_clones_per_rank=0, eplb_rehome_interval=1, record=tmp_path)
    model, slots = make_model(monkeypatch, group, options)
    for step in (1, 2, 2, 3):
        run_step(model, slots, step)
    planner: Any = model._planner
    assert (planner.taken, len(planner.started)) == (3, 3)
    assert np.array_equal(read_record(tmp_path).counts[:, 0], [[1, 1], [2, 2], [3, 3]])
    assert len((tmp_path / "eplb-rank00000.jsonl").read_text().splitlines()) == 3


def test_a_step_has_as_many_collectives_whatever_the_number_of_layers(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    counts = []
    for layers in (1, 3):
        options = Options(eplb=True, eplb_clones_per_rank=0)
        model, _ = make_model(monkeypatch, group, options, layers)
        planner = ClonePlanner(model._placement, group, torch.device("cpu"), 1, 0.1, HomeGate(0.1))
        monkeypatch.setattr(model, "_planner", planner)
        called: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            for name in (
                "all_reduce",
                "broadcast",
                "all_gather_into_tensor",
                "all_gather_object",
                "batch_isend_irecv",
                "barrier",
            ):
                patch.setattr(dist, name, count_calls(called, name, getattr(dist, name)))
            for step in (1, 2):
                model.begin_step(step)
                for one in model._layers:
                    one.deal(torch.ones(step, 2), torch.ones(step, 2, dtype=torch.bool))
                end_step(model, 1, highest=layers)
        counts.append(called)
    assert counts[0] == counts[1]
    # In each step one for the loads of all layers, one for those of all replicas, one for the figures; in the second a plan.
    assert counts[0] == {"all_reduce": 6, "broadcast": 1}


def count_calls(called: Counter[str], name: str, function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        return function(*args, **kwargs)

    return run


def test_a_layer_deals_home_before_any_step(group: Any) -> None:
    # A model may run outside a schedule: to generate text, say.
    layer = make_layer(group, clones_per_rank=1)
    slots = state.layer_slots[layer]
    probs, slot_map, _ = slots.deal(torch.tensor([[0.5, 0.0]]), torch.tensor([[True, False]]))
    assert slot_map.tolist() == [[True, False, False]] and probs.tolist() == [[0.5, 0.0, 0.0]]


def test_ranks_with_and_without_moe_layers_open_as_many_groups(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    # Torch names a group by how many a rank has opened: ranks that disagree wait for each other in vain in the next one.
    options = Options(eplb=True, eplb_clones_per_rank=0, eplb_rehome_interval=1)
    monkeypatch.setattr(balancing, "compile_planner", lambda: None)
    monkeypatch.setattr(balancing, "find_arguments", lambda: SimpleNamespace())
    monkeypatch.setattr(balancing.parallel_state, "get_expert_model_parallel_group", lambda: group)
    monkeypatch.setattr(balancing.parallel_state, "get_expert_model_parallel_world_size", lambda: 2)
    before = dist.distributed_c10d._world.group_count
    make_model(monkeypatch, group, options)
    between = dist.distributed_c10d._world.group_count
    ExpertBalancer(options)._attach([torch.nn.Linear(2, 2)], 1)
    assert between - before == dist.distributed_c10d._world.group_count - between


def test_where_nothing_can_be_written_a_record_ends_the_run_in_a_line_and_a_checkpoint_does_not(
    monkeypatch: pytest.MonkeyPatch, group: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    options = {"eplb": True, "eplb_clones_per_rank": 0, "eplb_rehome_interval": 1}
    model, slots = make_model(monkeypatch, group, Options(**options))
    run_step(model, slots, 1)
    model.save_loads(file)
    assert "loads are not kept" in capsys.readouterr().out
    model, slots = make_model(monkeypatch, group, Options(**options, record=file))
    with pytest.raises(BalanceError, match=r"--cf-record .*file: .*File exists.*; allowed: a folder that can be written"):
        run_step(model, slots, 1)


def test_what_is_kept_for_a_layer_goes_with_it(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    # Else every model that a process builds stays in memory.
    model, slots = make_model(monkeypatch, group, Options(eplb=True, eplb_clones_per_rank=0, eplb_rehome_interval=1))
    run_step(model, slots, 1)
    layer = weakref.ref(slots.layer)
    gc.collect()  # the models of other tests
    before = len(state.layer_slots)
    del model, slots
    gc.collect()
    assert layer() is None and len(state.layer_slots) == before - 1
