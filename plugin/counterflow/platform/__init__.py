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


def install_cpu(*, engine: bool = False) -> Patches:
    """Let Megatron run on the CPU in this process; ``.undo()`` on the result takes it back.

    With ``engine``, Transformer Engine runs too, over a stand-in for its compiled module (`counterflow.platform.engine`).
    """
    from counterflow.platform import cpu

    patches = cpu.install()
    try:
        if engine:
            from counterflow.platform.engine import install

            install(patches)
        from counterflow.platform import megatron_cpu

        megatron_cpu.install(patches)
    except BaseException:
        patches.undo()
        raise
    return patches
