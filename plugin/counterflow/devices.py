"""The device that a rank computes on, and marks in its stream of work.

Every room but the platform asks here and nowhere else. Under the CPU platform `torch.cuda` itself means the CPU.
"""

import ctypes
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

# CU_MODULE_EAGER_LOADING of cuda.h.
EAGER_LOADING = 1


def find_device() -> torch.device:
    """Return the device that this rank computes on: its current GPU, or the CPU where there is none."""
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def make_event(*, timed: bool = False) -> Any:
    """Return an event; ``timed`` ones know when a stream reached them."""
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def wait_for_device() -> None:
    """Wait until the device has done all work that was issued to it."""
    torch.cuda.synchronize()


def get_stream() -> Any:
    """Return the stream to which this thread issues its work; None without a GPU."""
    return torch.cuda.current_stream() if torch.cuda.is_available() else None


def issue_to(stream: Any) -> AbstractContextManager[Any]:
    """Let this thread issue its work to ``stream`` inside the block."""
    return torch.cuda.stream(stream)


def capture_random(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the state of the random numbers of the host and, where it is another, of the device."""
    with torch._C.DisableTorchFunction():
        host = (torch.default_generator.get_state(),)
        return (*host, torch.cuda.get_rng_state(device)) if device.type == "cuda" else host


def restore_random(device: torch.device, state: tuple[torch.Tensor, ...]) -> None:
    """Put what `capture_random` returned in force."""
    with torch._C.DisableTorchFunction():
        torch.default_generator.set_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)


def load_kernels_early() -> None:
    """Let CUDA load all kernels at its start, unless the environment says otherwise or CUDA has started.

    By default it loads a kernel at its first use, which waits until the GPU has done what it was given. That may be a transfer
    whose other end waits for this very kernel (CUDA's programming guide, "Lazy Loading", potential hazards; docs/gpus.md).
    """
    if torch.version.cuda is not None and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def are_kernels_lazy() -> bool:
    """Tell whether CUDA loads a kernel at its first use: by its driver, or by the environment where no driver answers."""
    mode = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuModuleGetLoadingMode(ctypes.byref(mode))
    except (OSError, AttributeError):
        failed = 1
    return os.environ.get("CUDA_MODULE_LOADING") != "EAGER" if failed else mode.value != EAGER_LOADING
