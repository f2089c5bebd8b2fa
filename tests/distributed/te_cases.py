"""The cases of Transformer Engine: its modules under every schedule and recipe, beside plain Megatron's run of the same model."""

from pathlib import Path

from tests.support.training import drop_flags, list_base_flags

STEPS = 4

# Sizes that FP8 takes, and what the CPU platform has of Transformer Engine.
SIZES = """
    --hidden-size 64 --ffn-hidden-size 128 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64
    --transformer-impl transformer_engine --moe-grouped-gemm
""".split()
NOT_TAKEN = ("--use-cpu-initialization", "--no-gradient-accumulation-fusion")
UNFUSED = ["--no-gradient-accumulation-fusion"]


def list_engine_flags(text: Path | None, directory: Path) -> list[str]:
    """Return the flags that all trainings on Transformer Engine have."""
    return [*drop_flags(list_base_flags(text, directory), *NOT_TAKEN), *SIZES]
