"""Megatron's side of an overlapped pair: which calls communicate, and which of its global state goes with each part."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from counterflow.runtime import communicate
from counterflow.runtime.communication import defer
from counterflow.runtime.handover import HandOver
from counterflow.schedule.actions import Action

F, B = Action("F", 0, 1), Action("B", 0, 0)


class Work:
    """A transfer that is there once it is waited for."""

    def __init__(self, output: torch.Tensor, given: torch.Tensor) -> None:
        self.output, self.given = output, given.clone()

    def wait(self) -> None:
        self.output.copy_(self.given)


def send(output: torch.Tensor, given: torch.Tensor, async_op: bool = False) -> Work | None:
    work = Work(output, given)
    return work if async_op else work.wait()


exchange = defer(send)


class Layer:
    """What pairs read of a layer; the adapter's state finds it by a weak reference, as it does modules."""

    def __init__(self, layer_number: int, config: Any, token_dispatcher: Any) -> None:
        self.layer_number, self.config, self.token_dispatcher = layer_number, config, token_dispatcher


class Dispatcher:
    """Keeps on itself what a layer has dispatched, as Megatron's do, its shared experts too."""

    def __init__(self, shared: bool) -> None:
        self.splits = 0
        self.shared_experts = SimpleNamespace(cached_output=0) if shared else None

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.splits = int(tokens[0])
        if self.shared_experts is not None:
            self.shared_experts.cached_output = int(tokens[0])
        received = torch.empty_like(tokens), torch.empty_like(probs)
        for output, given in zip(received, (tokens, probs), strict=True):
            exchange(output, given)
        return received


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "with shared experts"])
def test_a_layer_that_both_parts_run_keeps_what_each_has_dispatched(shared: bool) -> None:
    from counterflow.megatron.pipeline.overlap import mark_dispatch

    config = SimpleNamespace(moe_token_dispatcher_type="alltoall")
    layer = Layer(layer_number=3, config=config, token_dispatcher=Dispatcher(shared))
    dispatch = mark_dispatch(lambda layer, *given: layer.token_dispatcher.token_dispatch(*given))
    seen: list[tuple[int, ...]] = []
    said: list[str] = []
    handover = HandOver()

    def run(value: int) -> None:
        for _ in range(3):
            tokens, _ = dispatch(layer, torch.full((2,), float(value)), torch.ones(2))
            kept = layer.token_dispatcher.shared_experts
            seen.append((value, int(tokens[0]), layer.token_dispatcher.splits, kept.cached_output if kept else value))
            said.append(handover.describe())

    handover.run_pair(F, lambda: run(1), B, lambda: run(2))
    assert len(seen) == 6 and all(set(found) == {found[0]} for found in seen), seen
    assert handover.list_counts() == [(0, 3, 3)], "tokens and probabilities travel together"
    assert any("0F1 behind communication 1 (dispatch of layer 3)" in one for one in said)


def test_a_transfer_of_deep_ep_hands_over_before_it_is_waited_for() -> None:
    from counterflow.megatron.pipeline.overlap import hand_over_before, mark_combine

    log: list[str] = []
    wait = hand_over_before(lambda event: log.append(f"waits for {event}"))

    def combine(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        log.append("combine")
        wait("combine")
        return tokens

    layer = Layer(layer_number=1, config=None, token_dispatcher=SimpleNamespace(shared_experts=None, _comm_manager=None))
    combine = mark_combine(combine)
    with torch.no_grad():
        wait("layout")
        combine(layer, torch.ones(1))
    assert log == ["waits for layout", "combine", "waits for combine"]
    log.clear()
    HandOver().run_pair(F, lambda: combine(layer, torch.ones(1)), B, lambda: communicate(lambda: log.append("B"), lambda _: None))
    assert log == ["B", "combine", "waits for combine"]


def test_megatrons_global_state_goes_with_its_part() -> None:
    from counterflow.megatron.pipeline.overlap import list_carried
    from counterflow.platform import install_cpu

    patches = install_cpu()
    try:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random
        from megatron.core.utils import GlobalMemoryBuffer

        parallel_state._GLOBAL_MEMORY_BUFFER = GlobalMemoryBuffer()
        parallel_state.set_pipeline_model_parallel_rank(0)
        tracker = random.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", 5)
        seen: dict[str, list[Any]] = {"F": [], "B": []}

        def run(part: str, rank: int) -> None:
            parallel_state.set_pipeline_model_parallel_rank(rank)
            for _ in range(2):
                communicate(lambda: None, lambda _: None)
                with tracker.fork("model-parallel-rng"):
                    drawn = torch.rand(3)
                    communicate(lambda: None, lambda _: None)
                    drawn = torch.cat((drawn, torch.rand(3)))
                buffer = parallel_state.get_global_memory_buffer()
                seen[part].append((parallel_state.get_pipeline_model_parallel_rank(), drawn.tolist(), id(buffer)))

        HandOver(list_carried()).run_pair(F, lambda: run("F", 3), B, lambda: run("B", 1))
        assert [[one[0] for one in seen[part]] for part in "FB"] == [[3, 3], [1, 1]]
        assert [one[1] for one in seen["F"]] == [one[1] for one in seen["B"]], "each part draws as if it were alone"
        assert len({one[2] for part in "FB" for one in seen[part]}) == 2, "both parts gather into one buffer"
        assert parallel_state.get_pipeline_model_parallel_rank() == 3
    finally:
        parallel_state._GLOBAL_MEMORY_BUFFER = None
        parallel_state.set_pipeline_model_parallel_rank(None)
        tracker.reset()
        patches.undo()


def test_transformer_engines_queued_weight_gradients_are_left_where_the_backward_hands_over() -> None:
    from counterflow.runtime import defer_weight_grad
    from counterflow.runtime.executor import run_program
    from counterflow.runtime.lowering import lower
    from counterflow.schedule import ScheduleTable, lay_straight
    from counterflow.schedule.actions import pair

    log: list[str] = []
    queue: list[str] = []

    class Stage:
        def forward(self, stage: int, microbatch: int, received: Any) -> Any:
            return (torch.ones(1),)

        def backward(self, stage: int, microbatch: int, received: Any) -> Any:
            for layer in "ab":
                queue.append(layer)
                communicate(lambda layer=layer: log.append(f"transfer {layer}"), lambda _: None)
            return ()

        def leave_weight_grads(self, stage: int) -> None:
            while queue:
                defer_weight_grad(partial(log.append, f"weights {queue.pop(0)}"))

        def finish_backward(self, stage: int, microbatch: int) -> None:
            log.append("finished")

        def release_output(self, stage: int, microbatch: int) -> None: ...

    class NoMailbox:
        waiting = None

        def post(self, transfers: Any) -> None: ...

        def finish(self) -> None: ...

    table = ScheduleTable("pair", lay_straight(1), 2, ((Action("F", 0, 0), pair(F, B), Action("B", 0, 1)),))
    run_program(lower(table, 0), Stage(), NoMailbox(), handover=HandOver())  # type: ignore[arg-type]
    assert log[:5] == ["transfer a", "weights a", "transfer b", "weights b", "finished"]
