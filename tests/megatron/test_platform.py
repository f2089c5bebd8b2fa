"""What CUDA calls mean on the CPU platform, and that torch is itself again afterwards."""

import json
import os
from typing import Any

import pytest

from counterflow.errors import OptionError
from counterflow.platform import needs_cpu
from tests.support.running import run_python

pytestmark = pytest.mark.slow

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
stats = torch.cuda.memory_stats()
assert 2**20 < stats["allocated_bytes.all.current"] <= stats["allocated_bytes.all.peak"] < total
for key in ("reserved_bytes.all.current", "allocation.all.current", "segment.all.peak", "num_alloc_retries"):
    assert stats[key] >= 0
assert torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated()
assert torch.cuda.memory_reserved() <= torch.cuda.max_memory_reserved() < torch.cuda.device_memory_used() < total
for name in ("temperature", "power_draw", "utilization", "clock_rate"):
    assert getattr(torch.cuda, name)() >= 0
torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart()); torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())
with torch.cuda.device(0), torch.cuda.nvtx.range("x"):
    torch.cuda.profiler.start(); torch.cuda.profiler.stop()
torch.cuda.set_rng_state_all(torch.cuda.get_rng_state_all())
torch.cuda.manual_seed(7)
assert torch.cuda.initial_seed() == 7 == torch.cuda.default_generators[0].initial_seed()
least, greatest = torch.cuda.Stream.priority_range()
torch.cuda.Stream(priority=greatest)
for name in cpu.REFUSED:
    home, _, last = ("torch.cuda." + name).rpartition(".")
    try:
        getattr(eval(home), last)()
    except ValueError as error:
        assert f"torch.cuda.{name} means nothing on the CPU platform: drop the flag" in str(error), error
    else:
        raise AssertionError(name)
assert isinstance(torch.cuda.MemPool | None, object) and not isinstance(1, torch.cuda.CUDAGraph)
patches.undo()
assert torch.ones(1).type() == "torch.FloatTensor"
try:
    torch.zeros(1, device="cuda:99")
except (RuntimeError, AssertionError):
    print("itself again")
"""


def test_cuda_calls_mean_the_cpu_and_can_be_taken_back() -> None:
    assert run_python("-c", CHECKS).strip() == "itself again"


# Types, exceptions, decorators and modules that are the same without a GPU.
SAME = {
    *("BFloat16Tensor", "FloatTensor", "HalfTensor", "LongTensor", "OutOfMemoryError", "amp.custom_bwd", "amp.custom_fwd"),
    *("memory", "nvtx", "nvtx.range", "profiler"),
}
SWEEP = """
import json, re, sys
from operator import attrgetter
from pathlib import Path
import torch
from counterflow.platform import cpu
if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
else:
    import importlib.util
    folder = Path(importlib.util.find_spec("megatron").submodule_search_locations[0])
named = {}
for path in folder.rglob("*.py"):
    for line in path.read_text(errors="replace").splitlines():
        for name in re.findall(r"\\btorch\\.cuda\\.([A-Za-z_]\\w*(?:\\.[A-Za-z_]\\w*)*)", line.partition("#")[0]):
            named.setdefault(name, str(path))
def find(name):
    try:
        return attrgetter(name)(torch.cuda)
    except AttributeError:
        return None
before = {name: find(name) for name in named}
cpu.install()
print(json.dumps([len(named), {name: path for name, path in named.items() if find(name) is before[name]}]))
"""


@pytest.mark.parametrize("variable", ["", "MEGATRON_LM_0_17", "MEGATRON_LM_0_18", "MEGATRON_LM_0_20", "MEGATRON_LM_PATH"])
def test_all_that_megatron_asks_of_cuda_is_answered_or_refused(variable: str) -> None:
    if variable and variable not in os.environ:
        pytest.skip(f"set {variable} to a Megatron-LM checkout")
    trees = [f"{os.environ[variable]}/megatron"] if variable else []
    count, untouched = json.loads(run_python("-c", SWEEP, *trees))
    assert count > 40
    assert {name: path for name, path in untouched.items() if name not in SAME} == {}


def test_no_module_is_a_linear_for_inference_where_these_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import inference_layers

    from counterflow.patching import Patches
    from counterflow.platform.megatron_cpu import _know_no_inference_layers

    asked = "is_inference_column_parallel_linear"

    def ask(module: object) -> bool:
        return isinstance(module, inference_layers.InferenceColumnParallelLinear)

    monkeypatch.setattr(inference_layers, "InferenceColumnParallelLinear", object())
    monkeypatch.setattr(inference_layers, asked, ask, raising=False)
    with pytest.raises(TypeError):
        getattr(inference_layers, asked)(1)
    patches = Patches()
    _know_no_inference_layers(patches)
    assert getattr(inference_layers, asked)(1) is False
    patches.undo()
    assert getattr(inference_layers, asked) is ask


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
