"""What ``--cf-eplb`` does around Megatron's own calls, without a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer

from counterflow.errors import OptionError
from counterflow.megatron import state
from counterflow.megatron.experts import balancing
from counterflow.megatron.experts.balancing import ExpertBalancer
from counterflow.options import Options


class Model:
    """Notes what is asked of a `BalancedModel`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @contextmanager
    def be_at_home(self) -> Iterator[None]:
        self.calls.append("be_at_home")
        yield

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append(name)


@pytest.fixture
def balancer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExpertBalancer:
    monkeypatch.setattr(balancing, "find_arguments", lambda: SimpleNamespace(save=str(tmp_path), curr_iteration=0))
    made = ExpertBalancer(Options(eplb=True))
    made._is_attached, made.layers = True, Model()  # type: ignore[assignment]
    return made


def test_loads_are_kept_beside_persistent_checkpoints_alone(balancer: ExpertBalancer) -> None:
    # A folder of an iteration that holds loads and no checkpoint would be left in --save.
    save = balancer.wrap_save(lambda *args, **kwargs: None)
    save(4, non_persistent_ckpt=True)
    assert balancer.layers.calls == ["be_at_home"]  # type: ignore[union-attr]
    save(5)
    assert balancer.layers.calls[1:] == ["be_at_home", "save_loads"]  # type: ignore[union-attr]


def test_evaluation_ends_with_no_weights_under_way(balancer: ExpertBalancer) -> None:
    calls = balancer.layers.calls  # type: ignore[union-attr]
    run = balancer.wrap_schedule(lambda **kwargs: calls.append("run"))
    run(model=[], num_microbatches=1, forward_only=True)
    assert calls == ["refresh", "run", "finish_evaluation"]


def test_one_expert_parallel_rank_is_told_that_there_is_nothing_to_balance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(balancing.parallel_state, "get_expert_model_parallel_world_size", lambda: 1)
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        run = ExpertBalancer(Options(eplb=True)).wrap_schedule(lambda **kwargs: "ran")
        assert [run(model=[], num_microbatches=1) for _ in range(2)] == ["ran", "ran"]
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines, "rank 0 says it once for all"
        assert all("there is nothing to balance, training goes on without it" in line for line in said)


def test_clones_without_megatrons_data_parallelism_or_built_too_late_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoELayer.__new__(MoELayer)
    torch.nn.Module.__init__(layer)
    chunk = torch.nn.Sequential(layer)
    with pytest.raises(OptionError, match="were built before counterflow.enable"):
        balancing._find_slots([chunk])
    monkeypatch.setitem(state.layer_slots, layer, object())
    # Megatron wraps no model that it only evaluates.
    assert balancing._find_slots([chunk])
    with pytest.raises(
        OptionError, match="wrap each model chunk in DistributedDataParallel before its first step.* Sequential given"
    ):
        balancing._require_reductions([chunk])
    plain = torch.nn.Linear(1, 1)
    assert not balancing._find_slots([plain])
    balancing._require_reductions([plain])
