"""Let unmodified Megatron-Core and ``megatron.training`` code run on CPU ranks over gloo.

Megatron speaks to ``torch.cuda`` directly: it asks for the current device, makes streams and events,
writes ``device="cuda"`` into tensor factories. On a machine without a GPU, `install` gives each of
these a CPU meaning: the device is the CPU, work runs in program order (so a stream is a no-op and an
event a time stamp), the CUDA random state is the CPU's. Numbers are those of the CPU kernels.

Nothing here happens on import. `install` returns the patches; ``.undo()`` on them takes it all back.
"""

import contextlib
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from counterflow.patching import Patches

CPU = torch.device("cpu")


def map_device(device: Any) -> Any:
    """Return the CPU device where a CUDA one was named (string, index or device), else ``device``."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    # A bare index means a CUDA ordinal; bool is an int and is never a device.
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def _call_type(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    # Megatron's optimizers sort parameters by type names and know only those of CUDA tensors.
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    return tensor.type(dtype.replace("torch.cuda.", "torch.", 1) if isinstance(dtype, str) else dtype, **kwargs)


class CudaOnCpu(TorchFunctionMode):
    """Maps ``device="cuda"``, ``.cuda()``, ``.to("cuda")`` and CUDA type names to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": map_device(kwargs["device"])}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device, int)):
            args = (args[0], map_device(args[1]), *args[2:])
        elif func is torch.Tensor.type:
            return _call_type(*args, **kwargs)
        elif func is torch.Tensor.record_stream or func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)


class Stream:
    """A stream on a machine where all work runs in program order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Return at once: earlier work is done already."""

    def wait_stream(self, stream: "Stream") -> None:
        """Return at once: the other stream's work is done already."""

    def wait_event(self, event: "Event") -> None:
        """Return at once: an event that was recorded has happened."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Stamp ``event`` (or a new one) with the time now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Say that all work is done."""
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Event:
    """A point in program order, with its wall-clock time in seconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        """Stamp the event with the time now."""
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that the event has happened."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to ``end``."""
        return (end.time - self.time) * 1000.0


def _answer(value: Any) -> Callable[..., Any]:
    """Return a new function that gives ``value``: torch's compiler wants one object per torch.cuda name."""
    return lambda *args, **kwargs: value


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    # torch.manual_seed calls torch.cuda.manual_seed_all in turn, so the generator is seeded directly.
    torch.default_generator.manual_seed(int(seed))


def _describe_device(device: Any = None) -> SimpleNamespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=memory,
        multi_processor_count=os.cpu_count() or 1,
        gcnArchName="cpu",
        uuid="cpu",
    )


def _measure_memory(device: Any = None) -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


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


def _patch_cuda(patches: Patches) -> None:
    stream = Stream()
    replacements = {
        "is_available": _answer(True),
        "is_initialized": _answer(True),
        "device_count": _answer(1),
        "current_device": _answer(CPU),
        "set_device": _answer(None),
        "synchronize": _answer(None),
        "Stream": Stream,
        "Event": Event,
        "current_stream": _answer(stream),
        "default_stream": _answer(stream),
        "set_stream": _answer(None),
        "stream": lambda stream: contextlib.nullcontext(stream),
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "empty_cache": _answer(None),
        "ipc_collect": _answer(None),
        "get_device_properties": _describe_device,
        "get_device_name": _answer("cpu"),
        "get_device_capability": _answer((0, 0)),
        "mem_get_info": _measure_memory,
        "memory_stats": _answer({}),
        "memory_allocated": _answer(0),
        "max_memory_allocated": _answer(0),
        "memory_reserved": _answer(0),
        "max_memory_reserved": _answer(0),
        "reset_peak_memory_stats": _answer(None),
        "is_current_stream_capturing": _answer(False),
    }
    for name, value in replacements.items():
        patches.set(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        patches.set(torch.cuda.random, name, replacements[name])
    for name in ("range_push", "range_pop", "mark"):
        patches.set(torch.cuda.nvtx, name, _answer(None))
    # The data loader asks the accelerator, not CUDA, whether to pin memory.
    patches.set(torch.accelerator, "is_available", _answer(False))


def install() -> Patches:
    """Give CUDA calls of Python code a CPU meaning in this process; return the undo log."""
    patches = Patches()
    _patch_cuda(patches)
    # Megatron demands it for tensor parallelism; it orders kernels that are not there.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron compiles its fused functions; for the CPU that takes minutes and gains nothing.
    compiled = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    patches.on_undo(lambda: setattr(torch._dynamo.config, "disable", compiled))
    patches.set(torch.distributed, "init_process_group", _init_process_group(torch.distributed.init_process_group))
    patches.set(torch.distributed, "new_group", _new_group(torch.distributed.new_group))
    # A mode, once entered, stays on this thread's stack: leaving it is part of the undo.
    mode = CudaOnCpu()
    mode.__enter__()  # type: ignore[no-untyped-call]
    patches.on_undo(lambda: mode.__exit__(None, None, None))  # type: ignore[no-untyped-call]
    return patches
