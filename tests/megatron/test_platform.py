"""What CUDA calls mean on the CPU platform, and that torch is itself again afterwards."""

import subprocess
import sys
from typing import Any

import pytest

from counterflow.errors import OptionError
from counterflow.platform import needs_cpu

CHECKS = """
import torch
from counterflow.platform import cpu
patches = cpu.install()
assert torch.cuda.is_available() and torch.cuda.device_count() == 1
assert torch.cuda.current_device() == torch.device("cpu")
for made in (
    torch.zeros(2, device="cuda"),
    torch.tensor([1.0], device="cuda:0"),
    torch.empty(1, device=torch.device("cuda", 3)),
    torch.ones(1).cuda(),
    torch.ones(1).to("cuda"),
    torch.ones(1).to(torch.device("cuda")),
    torch.ones(1).to(device=0),
    torch.ones(1).new_zeros(3, device="cuda"),
    torch.ones(1).pin_memory(),
):
    assert made.device.type == "cpu", made
assert torch.ones(1).to(torch.float64).dtype == torch.float64
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16
assert torch.ones(1).type(torch.float16).dtype == torch.float16
begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
begin.record(); sum(range(100000)); end.record()
assert begin.elapsed_time(end) > 0
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    stream.wait_stream(torch.cuda.current_stream()); stream.synchronize()
torch.cuda.manual_seed(7); state = torch.cuda.get_rng_state(); first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
free, total = torch.cuda.mem_get_info()
assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory
patches.undo()
assert torch.ones(1).type() == "torch.FloatTensor"
try:
    torch.zeros(1, device="cuda:99")
except (RuntimeError, AssertionError):
    print("itself again")
"""


def test_cuda_calls_mean_the_cpu_and_can_be_taken_back() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "itself again"


def test_the_choice_of_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert needs_cpu("cpu")
        assert needs_cpu("auto") is not has_gpu
    assert not needs_cpu("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="--cf-platform cuda given but torch finds no GPU"):
        needs_cpu("cuda")


def test_a_load_leaves_adams_step_to_the_parameter_groups() -> None:
    from counterflow.platform.megatron_cpu import _leave_step_alone

    def set_states(optimizer: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        found.append(tensors)

    found: list[dict[str, Any]] = []
    # The distributed optimizer's default form hands over the step of before the load, the others none.
    for given in ({"exp_avg": "read", "step": "before"}, {"exp_avg": "read"}):
        _leave_step_alone(set_states)(None, None, given)
    assert found == [{"exp_avg": "read", "step": None}] * 2
