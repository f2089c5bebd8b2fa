"""Let unmodified Megatron-Core and ``megatron.training`` code run on CPU ranks over gloo.

Megatron speaks to ``torch.cuda`` directly: it asks for the current device, makes streams and events,
writes ``device="cuda"`` into tensor factories. On a machine without a GPU, `install` gives each of
these a CPU meaning: the device is the CPU, work runs in program order unless it is submitted to a stream
(`platform.streams`), the CUDA random state is the CPU's. Numbers are those of the CPU kernels.

Nothing here happens on import. `install` returns the patches; ``.undo()`` on them takes it all back.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo

from counterflow.patching import Patches
from counterflow.platform import streams
from counterflow.platform.devices import CPU, CudaOnCpu


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
    replacements = {
        "is_available": _answer(True),
        "is_initialized": _answer(True),
        "device_count": _answer(1),
        "current_device": _answer(CPU),
        "set_device": _answer(None),
        "synchronize": lambda device=None: streams.synchronize_all(),
        "Stream": streams.Stream,
        "Event": streams.Event,
        "current_stream": lambda device=None: streams.get_current(),
        "default_stream": _answer(streams.DEFAULT),
        "set_stream": streams.set_current,
        "stream": lambda stream: streams.run_on(stream),
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
    # Tells CUDA's allocator who else uses the memory; torch takes no other stream than its own there.
    patches.set(torch.Tensor, "record_stream", lambda tensor, stream: None)
    # The data loader asks the accelerator, not CUDA, whether to pin memory.
    patches.set(torch.accelerator, "is_available", _answer(False))


def install() -> Patches:
    """Give CUDA calls of Python code a CPU meaning in this process; return the undo log."""
    patches = Patches()
    _patch_cuda(patches)
    patches.on_undo(streams.stop_all)
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
