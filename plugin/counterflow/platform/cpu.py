"""Let unmodified Megatron-Core and ``megatron.training`` code run on CPU ranks over gloo.

Megatron calls ``torch.cuda`` directly: it asks for the current device, makes streams and events, and passes
``device="cuda"`` to tensor factories. `install` gives each of these a meaning on the CPU. The device is the CPU, work runs in
program order unless it is submitted to a stream (`platform.streams`), and the CUDA random state is the CPU's.

Importing this module changes nothing. `install` returns the undo log.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch._dynamo

from counterflow.errors import OptionError
from counterflow.patching import Patches
from counterflow.platform import memory, streams
from counterflow.platform.devices import CPU, CudaOnCpu


def _always(value: Any) -> Callable[..., Any]:
    """Return a new function that returns ``value``. Torch's compiler needs a function of its own for each name of torch.cuda."""
    return lambda *args, **kwargs: value


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    # torch.manual_seed calls torch.cuda.manual_seed_all in turn, so the generator is seeded directly.
    torch.default_generator.manual_seed(int(seed))


def _describe_device(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=memory.measure_machine()[1],
        multi_processor_count=os.cpu_count() or 1,
        gcnArchName="cpu",
        uuid="cpu",
    )


class _OnDevice(nullcontext[None]):
    """Stands for ``torch.cuda.device``, a context manager whose class and index torch reads."""

    idx = 0

    def __init__(self, device: Any = None) -> None:
        super().__init__()


class _Meaningless:
    """Stands for a name that has no meaning on a CPU; calling it raises an error that names it.

    It is a class, since some of these names are used in annotations and with isinstance.
    """

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise OptionError(
            f"torch.cuda.{cls.name} means nothing on the CPU platform: drop the flag that asks for it, or run on a GPU with "
            "--cf-platform cuda"
        )


def _refuse(name: str) -> type:
    return type(name.rpartition(".")[2], (_Meaningless,), {"name": name})


def _init_process_group(original: Any) -> Any:
    def init_process_group(backend: str | None = None, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        original(backend=backend if backend in ("fake", "mpi") else "gloo", **kwargs)

    return init_process_group


def _new_group(original: Any) -> Any:
    def new_group(*args: Any, **kwargs: Any) -> Any:
        # Megatron names NCCL, and NCCL options, for some of its groups.
        if kwargs.get("backend") not in ("fake", "mpi"):
            kwargs["backend"] = "gloo"
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        return original(*args, **kwargs)

    return new_group


# Names that have no meaning on a CPU: graphs, memory pools, streams of other libraries, the allocator's history.
REFUSED = (
    *("CUDAGraph", "graph", "graph_pool_handle", "make_graphed_callables", "MemPool", "use_mem_pool", "ExternalStream"),
    *("CUDAPluggableAllocator", "change_current_allocator", "memory_snapshot", "memory_summary", "_sleep"),
    *("memory._snapshot", "memory._dump_snapshot", "memory._record_memory_history"),
)


def _list_device_answers() -> dict[str, Any]:
    # Values that a CPU does not report, such as its temperature, are 0.
    return {
        "is_available": _always(True),
        "is_initialized": _always(True),
        "init": _always(None),
        "device_count": _always(1),
        "current_device": _always(CPU),
        "set_device": _always(None),
        "device": _OnDevice,
        "device_of": _OnDevice,
        "get_device_properties": _describe_device,
        "get_device_name": _always("cpu"),
        "get_device_capability": _always((0, 0)),
        "temperature": _always(0),
        "power_draw": _always(0),
        "clock_rate": _always(0),
        "utilization": lambda device=None: int(psutil.cpu_percent()),
        # Start and stop of CUDA's profiler.
        "cudart": _always(SimpleNamespace(cudaProfilerStart=_always(0), cudaProfilerStop=_always(0))),
        "check_error": _always(None),
        "profiler.start": _always(None),
        "profiler.stop": _always(None),
        "nvtx.range_push": _always(None),
        "nvtx.range_pop": _always(None),
        "nvtx.mark": _always(None),
    }


def _list_stream_answers() -> dict[str, Any]:
    return {
        "synchronize": lambda device=None: streams.synchronize_all(),
        "Stream": streams.Stream,
        "Event": streams.Event,
        "current_stream": lambda device=None: streams.get_current(),
        "default_stream": _always(streams.DEFAULT),
        "set_stream": streams.set_current,
        "stream": lambda stream: streams.run_on(stream),
        "is_current_stream_capturing": _always(False),
    }


def _list_random_answers() -> dict[str, Any]:
    return {
        "default_generators": (torch.default_generator,),
        "initial_seed": torch.initial_seed,
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda new_states: torch.set_rng_state(new_states[0]),
    }


def _list_memory_answers() -> dict[str, Any]:
    return {
        "empty_cache": _always(None),
        "ipc_collect": _always(None),
        "mem_get_info": memory.measure_machine,
        "device_memory_used": memory.get_used,
        "memory_stats": memory.list_stats,
        "memory_allocated": memory.get_resident,
        "memory_reserved": memory.get_resident,
        "max_memory_allocated": memory.get_peak,
        "max_memory_reserved": memory.get_peak,
        "reset_peak_memory_stats": _always(None),
        "reset_max_memory_allocated": _always(None),
    }


def _patch_cuda(patches: Patches) -> None:
    answers = _list_device_answers() | _list_stream_answers() | _list_random_answers() | _list_memory_answers()
    for path, value in (answers | {name: _refuse(name) for name in REFUSED}).items():
        home, _, name = path.rpartition(".")
        patches.set(getattr(torch.cuda, home) if home else torch.cuda, name, value)
        for module in (torch.cuda.random, torch.cuda.memory):
            # The functions of these modules call it by that name.
            if not home and hasattr(module, name):
                patches.set(module, name, value)
    # Tells CUDA's allocator that another stream uses the memory; torch accepts no stream but its own here.
    patches.set(torch.Tensor, "record_stream", lambda tensor, stream: None)
    # The data loader asks the accelerator, not CUDA, whether to pin memory.
    patches.set(torch.accelerator, "is_available", _always(False))


def _keep_mode(run_backward: Any) -> Any:
    """Wrap the start of autograd: torch leaves the mode for the call, and Python code of a backward may name a CUDA device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.overrides._get_current_function_mode() is not None:  # type: ignore[no-untyped-call]
            return run_backward(*args, **kwargs)
        with CudaOnCpu():
            return run_backward(*args, **kwargs)

    return run


def _gather_bytes(gather: Any) -> Any:
    """Wrap a gather of several tensors at once: gloo takes all for the type of the first, so they are gathered as bytes."""

    def run(group: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *options: Any) -> Any:
        if len({tensor.dtype for tensor in inputs}) > 1:
            outputs, inputs = ([tensor.view(torch.uint8) for tensor in tensors] for tensors in (outputs, inputs))
        return gather(group, outputs, inputs, *options)

    return run


def install() -> Patches:
    """Give CUDA calls of Python code a CPU meaning in this process; return the undo log."""
    patches = Patches()
    _patch_cuda(patches)
    patches.on_undo(streams.stop_all)
    # Megatron requires this variable for tensor parallelism; on the CPU it has no effect.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron compiles its fused functions; on the CPU that takes minutes and gains nothing.
    compiled = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    patches.on_undo(lambda: setattr(torch._dynamo.config, "disable", compiled))
    patches.set(torch.distributed, "init_process_group", _init_process_group(torch.distributed.init_process_group))
    patches.set(torch.distributed, "new_group", _new_group(torch.distributed.new_group))
    patches.set(torch.autograd, "_engine_run_backward", _keep_mode(vars(torch.autograd)["_engine_run_backward"]))
    for name in ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"):  # the second since torch 2.14
        if (gather := getattr(torch.distributed.ProcessGroup, name, None)) is not None:
            patches.set(torch.distributed.ProcessGroup, name, _gather_bytes(gather))
    # The mode stays on this thread's stack until the undo log leaves it.
    mode = CudaOnCpu()
    mode.__enter__()  # type: ignore[no-untyped-call]
    patches.on_undo(lambda: mode.__exit__(None, None, None))  # type: ignore[no-untyped-call]
    return patches
