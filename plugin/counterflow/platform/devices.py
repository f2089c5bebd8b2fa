"""Map CUDA devices to the CPU, wherever Python code names one."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
    # Megatron's optimizers sort parameters by type name and know the names of CUDA tensors only.
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    return tensor.type(dtype.replace("torch.cuda.", "torch.", 1) if isinstance(dtype, str) else dtype, **kwargs)


# The methods that name a device other than by the keyword ``device``.
_NAMING = frozenset((torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.type, torch.Tensor.to))


class CudaOnCpu(TorchFunctionMode):
    """Maps ``device="cuda"``, ``.cuda()``, ``.to("cuda")`` and CUDA type names to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every operation of torch passes here, so the usual case, in which no device is named, comes first.
        if func not in _NAMING:
            if not kwargs:
                return func(*args)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": map_device(kwargs["device"])}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type:
            return _call_type(*args, **kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": map_device(kwargs["device"])}
        if len(args) > 1 and isinstance(args[1], (str, torch.device, int)):
            args = (args[0], map_device(args[1]), *args[2:])
        return func(*args, **kwargs)
