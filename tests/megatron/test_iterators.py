"""Megatron's calls that take one data iterator, given those of several chunks."""

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, RerunStateMachine

from counterflow.megatron.pipeline import iterators
from counterflow.megatron.pipeline.iterators import draw_from_every_chunk, save_first_chunks_loader


def refuse(data_iterator: Any) -> None:
    raise TypeError(f"'{type(data_iterator).__name__}' object is not an iterator")


@pytest.mark.parametrize("mode", [RerunMode.DISABLED, RerunMode.VALIDATE_RESULTS])
@pytest.mark.parametrize("held", [(0, 1), (0, None), (None, None), (1,), (None,)], ids=str)
def test_a_skipped_step_is_drawn_from_every_chunk(
    monkeypatch: pytest.MonkeyPatch, mode: RerunMode, held: tuple[int | None, ...]
) -> None:
    machine = RerunStateMachine(mode=mode)
    monkeypatch.setattr("megatron.core.rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE", machine)
    # Both want the device that trains.
    monkeypatch.setattr(machine, "_save_state", lambda: None)
    monkeypatch.setattr(machine, "_reduce_any", lambda value: value)
    monkeypatch.setattr(iterators, "get_num_microbatches", lambda: 3)
    drawn = [None if one is None else RerunDataIterator(iter(range(10))) for one in held]
    skip = draw_from_every_chunk(refuse)
    for _ in range(2):
        skip(drawn if len(drawn) > 1 else drawn[0])
    assert {next(one) for one in drawn if one is not None} <= {6}
    assert machine.current_iteration == 1, "Megatron's count of steps is off"


def test_the_loader_of_the_first_chunk_is_saved() -> None:
    saved: list[Any] = []
    save = save_first_chunks_loader(lambda iterator, iteration, path, **groups: saved.append((iterator, iteration, path, groups)))
    first = SimpleNamespace()
    save([first, SimpleNamespace()], 5, "x", pp_group=None)
    save(first, 6, "x")
    save(None, 7, None)
    assert saved == [(first, 5, "x", {"pp_group": None}), (first, 6, "x", {}), (None, 7, None, {})]
