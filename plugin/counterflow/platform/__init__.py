"""The platform of ranks: GPUs, as Megatron expects, or the CPU over gloo."""

from counterflow.errors import OptionError
from counterflow.patching import Patches


def needs_cpu(choice: str) -> bool:
    """Tell whether ``--cf-platform`` (auto, cpu, cuda) means the CPU on this machine."""
    import torch

    has_gpu = torch.cuda.is_available()
    if choice == "cuda" and not has_gpu:
        raise OptionError("--cf-platform cuda given but torch finds no GPU: use auto or cpu, or check the driver")
    return choice == "cpu" or (choice == "auto" and not has_gpu)


def install_cpu() -> Patches:
    """Let Megatron run on the CPU in this process; ``.undo()`` on the result takes it back."""
    from counterflow.platform import cpu, megatron_cpu

    patches = cpu.install()
    megatron_cpu.install(patches)
    return patches
