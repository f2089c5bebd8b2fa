"""Weight gradients of Megatron's own linears, split off the backward, under its own data-parallel wrapper."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from counterflow.errors import ScheduleError
from counterflow.megatron.zero_bubble import defer_engine_weight_grads, split_local_linears, watch_reductions
from counterflow.platform import install_cpu
from counterflow.runtime.weight_grads import hold_weight_grads

# Megatron's layers ask for groups that only its own training code passes on.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    patches = install_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as rng

    split_local_linears(patches)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    rng.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    patches.undo()


def make_chunk(overlap: bool, fused: bool = False) -> Any:
    """Return two of Megatron's linears under its DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, gradient_accumulation_fusion=fused
    )
    how: dict[str, Any] = {"config": config, "init_method": torch.nn.init.ones_, "bias": True, "skip_bias_add": False}
    torch.manual_seed(0)

    class Linears(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = ColumnParallelLinear(8, 16, gather_output=False, **how)
            self.down = RowParallelLinear(16, 8, input_is_parallel=True, **how)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x)[0]))[0]

    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap, use_distributed_optimizer=False)
    chunk = DistributedDataParallel(config, ddp, Linears())
    watch_reductions([chunk])
    return chunk


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
