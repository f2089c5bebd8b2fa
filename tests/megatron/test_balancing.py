"""What ``--cf-eplb`` does around Megatron's own calls, without a model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.config import Options
from counterflow.megatron import balancing
from counterflow.megatron.balancing import ExpertBalancer


class Model:
    """Notes what is asked of a `BalancedModel`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append(name)


@pytest.fixture
def balancer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ExpertBalancer:
    monkeypatch.setattr(balancing, "_get_args", lambda: SimpleNamespace(save=str(tmp_path), curr_iteration=0))
    made = ExpertBalancer(Options(eplb=True))
    made._is_attached, made._model = True, Model()  # type: ignore[assignment]
    return made


def test_loads_are_kept_beside_persistent_checkpoints_alone(balancer: ExpertBalancer) -> None:
    # A folder of an iteration that holds loads and no checkpoint would be left in --save.
    save = balancer.wrap_save(lambda *args, **kwargs: None)
    save(4, non_persistent_ckpt=True)
    assert balancer._model.calls == ["bring_homes_back"]  # type: ignore[union-attr]
    save(5)
    assert balancer._model.calls[1:] == ["bring_homes_back", "save_loads"]  # type: ignore[union-attr]


def test_evaluation_ends_with_no_weights_under_way(balancer: ExpertBalancer) -> None:
    calls = balancer._model.calls  # type: ignore[union-attr]
    run = balancer.wrap_schedule(lambda **kwargs: calls.append("run"))
    run(model=[], num_microbatches=1, forward_only=True)
    assert calls == ["refresh", "run", "finish_evaluation"]
