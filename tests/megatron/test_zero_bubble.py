"""Weight gradients of Megatron's own linears, split off the backward, under its own data-parallel wrapper."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.megatron.gradients import GRADIENTS
from counterflow.megatron.pipeline.zero_bubble import (
    _make_split_linear,
    defer_engine_weight_grads,
    split_local_linears,
    watch_reductions,
)
from counterflow.moe.clones import _prepare
from counterflow.patching import Patches
from counterflow.platform import install_cpu
from counterflow.runtime.weight_grads import hold_weight_grads

# Megatron's layers ask for groups that only its own training code passes on.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patches = install_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as rng

    split_local_linears(patches)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    rng.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    patches.undo()


def make_linears(fused: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return two of Megatron's linears, one after the other, and their configuration."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, gradient_accumulation_fusion=fused
    )
    how: dict[str, Any] = {
        "config": config,
        "init_method": partial(torch.nn.init.normal_, std=0.2),
        "bias": True,
        "skip_bias_add": False,
    }
    torch.manual_seed(0)

    class Linears(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = ColumnParallelLinear(8, 16, gather_output=False, **how)
            self.down = RowParallelLinear(16, 8, input_is_parallel=True, **how)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x)[0]))[0]

    return Linears().to(dtype), config


def make_chunk(overlap: bool, fused: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Return two of Megatron's linears under its DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    linears, config = make_linears(fused, dtype)
    ddp = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap, use_distributed_optimizer=False, grad_reduce_in_fp32=True, check_for_nan_in_grad=True
    )
    chunk = DistributedDataParallel(config, ddp, linears)
    watch_reductions([chunk])
    return chunk


def make_clone(overlap: bool, fused: bool = False) -> Any:
    """Return two of Megatron's linears as expert balancing has them for a clone: no DDP, the gradient goes another way."""
    (clone, _), (home, _) = make_linears(fused), make_linears(fused)
    for parameter in home.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    weights = [parameter.data.clone() for parameter in clone.parameters()]
    _prepare(list(clone.parameters()), list(home.parameters()), GRADIENTS)
    for parameter, weight in zip(clone.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    return SimpleNamespace(module=clone)


def run_forward(chunk: Any) -> torch.Tensor:
    x = torch.linspace(-1, 1, 3 * 2 * 8).reshape(3, 2, 8).requires_grad_()
    return chunk(x).square().sum()


def read_gradients(chunk: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in chunk.module.named_parameters()}


@pytest.mark.parametrize("overlap", [False, True])
def test_an_i_leaves_weight_gradients_to_its_w(one_rank: None, overlap: bool) -> None:
    whole, split = make_chunk(overlap), make_chunk(overlap)
    with whole.no_sync(), split.no_sync():
        run_forward(whole).backward()
        with hold_weight_grads() as queue:
            run_forward(split).backward()
        expected, found = read_gradients(whole), read_gradients(split)
        assert len(queue) == 2, "a linear did not hand its weight gradient over"
        for name in expected:
            weights = name.endswith("weight")
            assert torch.equal(found[name], torch.zeros_like(found[name]) if weights else expected[name]), f"{name} after the I"
        for compute in queue:
            compute()
        for name, gradient in read_gradients(split).items():
            assert expected[name].abs().sum() > 0
            torch.testing.assert_close(gradient, expected[name])


def test_a_weight_gradient_after_its_reduction_is_caught(one_rank: None) -> None:
    chunk = make_chunk(overlap=True)
    with chunk.no_sync(), hold_weight_grads() as late:
        run_forward(chunk).backward()
    chunk.start_grad_sync()
    with pytest.raises(ScheduleError, match=r"a weight gradient of shape \(.*\) came after the data-parallel reduction"):
        late[0]()
    chunk.finish_grad_sync()


def test_a_whole_backward_starts_its_reductions_from_its_hooks(one_rank: None) -> None:
    """With every weight gradient there in the B, upstream's own hooks fill the buckets and start them."""
    chunk = make_chunk(overlap=True)
    run_forward(chunk).backward()
    chunk.finish_grad_sync()
    chunk.zero_grad_buffer()
    run_forward(chunk).backward()  # from the second batch on, full buckets start by themselves
    assert all(group.grad_reduce_handle is not None for group in chunk.bucket_groups), "a reduction was not started"
    chunk.finish_grad_sync()
    assert read_gradients(chunk)["down.weight"].abs().sum() > 0


@contextmanager
def replace_linear(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Let Megatron's linears be what ``wrap`` makes of upstream's, inside the block."""
    from megatron.core.tensor_parallel import layers

    patches, name = Patches(), "LinearWithGradAccumulationAndAsyncCommunication"
    patches.set(layers, name, wrap(getattr(layers, name).__base__))
    yield
    patches.undo()


def assert_same_bits(expected: dict[str, torch.Tensor], *found: dict[str, torch.Tensor]) -> None:
    assert expected["up.weight"].any()
    for gradients in found:
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), name


def run_linears(chunk: Any, x: torch.Tensor) -> torch.Tensor:
    return chunk(x).square().sum()


def add_penalty(chunk: Any, x: torch.Tensor) -> torch.Tensor:
    return run_linears(chunk, x) + sum(parameter.square().sum() for parameter in chunk.parameters())


def penalize_alone(chunk: Any, x: torch.Tensor) -> torch.Tensor:
    # Of a sum the gradient is a single number, expanded.
    return x.sum() + sum(parameter.sum() for parameter in chunk.parameters())


def use_twice(chunk: Any, x: torch.Tensor) -> torch.Tensor:
    return run_linears(chunk, chunk(x))


def use_twice_and_add_penalty(chunk: Any, x: torch.Tensor) -> torch.Tensor:
    return add_penalty(chunk, chunk(x))


def use_outside_a_linear(chunk: Any, x: torch.Tensor) -> torch.Tensor:
    return run_linears(chunk, x) + torch.nn.functional.linear(x, chunk.up.weight).square().sum()


Use = Callable[[Any, torch.Tensor], torch.Tensor]
# What each micro-batch does with the weights.
USES: dict[str, list[Use]] = {
    "a penalty": [add_penalty, add_penalty],
    "used twice": [use_twice, use_twice],
    "used twice, and a penalty": [use_twice_and_add_penalty, use_twice_and_add_penalty],
    "outside a linear": [use_outside_a_linear, use_outside_a_linear],
    "a penalty first": [add_penalty, run_linears],
    "a penalty last": [run_linears, add_penalty],
    "a penalty alone first": [penalize_alone, run_linears],
    "a penalty alone last": [run_linears, penalize_alone],
    "a penalty alone between": [run_linears, penalize_alone, use_twice],
}


def run_microbatches(chunk: Any, uses: list[Use], actions: str) -> None:
    """Run the backwards of ``uses``, as B or as I, then the Ws."""
    queues = []
    for number, (use, action) in enumerate(zip(uses, actions, strict=True)):
        x = torch.linspace(-1 - number, 1, 3 * 2 * 8).reshape(3, 2, 8).requires_grad_()
        loss = use(chunk.module, x.to(chunk.module.up.weight.dtype))
        if action == "B":
            loss.backward()
            continue
        with hold_weight_grads() as queue:
            loss.backward()
        queues.append(queue)
    for queue in queues:
        for compute in queue:
            compute()


def make_reference(uses: list[Use]) -> dict[str, torch.Tensor]:
    """Return what autograd makes of the same micro-batches: without gradient buffers, linears are upstream's own."""
    linears, _ = make_linears()
    run_microbatches(SimpleNamespace(module=linears), uses, "B" * len(uses))
    return {name: parameter.grad for name, parameter in linears.named_parameters()}


def stand_in_for_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=lambda x, gradient, main: main.add_(gradient.t().matmul(x)))
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)


@pytest.mark.parametrize("actions", ["I", "B", "IB", "BI"])
@pytest.mark.parametrize("uses", USES.values(), ids=USES)
@pytest.mark.parametrize("held", ["by DDP", "by DDP that overlaps", "by DDP, fused", "as a clone"])
def test_every_use_of_a_weight_adds_its_gradient(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, held: str, uses: list[Use], actions: str
) -> None:
    stand_in_for_fused_kernels(monkeypatch)
    expected = make_reference(uses)
    chunk = (make_clone if held == "as a clone" else make_chunk)(overlap="overlaps" in held, fused="fused" in held)
    run_microbatches(chunk, uses, (actions * 3)[: len(uses)])
    for name, gradient in read_gradients(chunk).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_sum_over_uses_is_rounded_as_autograd_rounds_it(one_rank: None) -> None:
    """In half precision the order of additions shows: first over the uses in a micro-batch, then over micro-batches."""
    gradients = []
    for wrap, action in ((lambda upstream: upstream, "B"), (_make_split_linear, "B"), (_make_split_linear, "I")):
        with replace_linear(wrap):
            chunk = make_chunk(overlap=False, dtype=torch.bfloat16)
            run_microbatches(chunk, [use_twice, use_twice], action * 2)
        gradients.append(read_gradients(chunk))
    assert_same_bits(*gradients)


def test_a_frozen_weight_gets_no_gradient(one_rank: None) -> None:
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as run

    chunk = make_chunk(overlap=False)
    weight = chunk.module.up.weight
    weight.requires_grad_(False)

    def use_frozen(linears: Any, x: torch.Tensor) -> torch.Tensor:
        how = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}
        return run(input=x, weight=weight, bias=None, **how).square().sum()

    run_microbatches(chunk, [use_frozen], "I")
    assert not read_gradients(chunk)["up.weight"].any()


def cast_logits(upstream: Any) -> Any:
    """Return upstream's linear as Megatron-Core 0.20 has it: its output may be of another type, its backward casts back."""

    class CastingLinear(upstream):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
            ctx.input_dtype = inputs[0].dtype
            return upstream.forward(ctx, *inputs).float()

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
            return upstream.backward(ctx, grad_output.to(ctx.input_dtype))

    return CastingLinear


@pytest.mark.parametrize("action", ["I", "B"])
def test_logits_of_another_type_than_the_weights(one_rank: None, action: str) -> None:
    gradients = []
    for wrap in (lambda upstream: upstream, _make_split_linear):
        with replace_linear(lambda upstream, wrap=wrap: wrap(cast_logits(upstream))):
            chunk = make_chunk(overlap=False, dtype=torch.bfloat16)
            run_microbatches(chunk, [lambda linears, x: linears.up(x)[0].square().sum()], action)
        gradients.append(read_gradients(chunk))
    assert_same_bits(*gradients)


class EngineLinear(torch.nn.Module):
    """What a linear of Transformer Engine does with ``delay_wgrad_compute``: a use queues an entry, ``backward_dw`` runs one."""

    def __init__(self, is_delayed: bool = True) -> None:
        super().__init__()
        self.wgrad_store = SimpleNamespace(context=queue.Queue() if is_delayed else None, delay_wgrad_compute=lambda: is_delayed)
        self.done: list[str] = []

    def backward_dw(self) -> None:
        self.done.append(self.wgrad_store.context.get_nowait())


def test_every_use_of_an_engines_module_has_its_weight_gradient_computed() -> None:
    chunk = torch.nn.ModuleDict({"once": EngineLinear(), "twice": EngineLinear(), "whole": EngineLinear(is_delayed=False)})
    once, twice = chunk["once"], chunk["twice"]
    queues = []
    for microbatch in "01":
        with hold_weight_grads() as held:
            for module, uses in ((once, "a"), (twice, "ab")):
                for use in uses:
                    module.wgrad_store.context.put(microbatch + use)
            defer_engine_weight_grads(chunk)
        queues.append(held)
    # A B among Is that wait: it runs as many as it queued.
    twice.wgrad_store.context.put("2a")
    defer_engine_weight_grads(chunk)
    assert (once.done, twice.done) == ([], ["0a"])
    for held, done in zip(queues, (["0a", "0b", "1a"], ["0a", "0b", "1a", "1b", "2a"]), strict=True):
        for compute in held:
            compute()
        assert twice.done == done
    assert once.done == ["0a", "1a"]


def test_a_backward_does_not_walk_over_all_modules_again() -> None:
    class Chunk(torch.nn.Linear):
        walks = 0

        def modules(self) -> Iterator[torch.nn.Module]:
            self.walks += 1
            return super().modules()

    chunk = Chunk(1, 1)
    for _ in range(3):
        defer_engine_weight_grads(chunk)
    assert chunk.walks == 1
