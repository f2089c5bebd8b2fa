"""The example's model made small: the flags of its trainings, and lists of them."""

from pathlib import Path
from typing import Any

from tests.support.run_cases import Case
from train import read_flags

SMALL = """
    --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --ffn-hidden-size 64
    --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16
    --num-experts 4 --moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk 2
    --micro-batch-size 1 --global-batch-size 12 --lr-warmup-iters 2 --eval-interval 5 --eval-iters 1 --split 80,10,10
    --distributed-timeout-minutes 2 --num-workers 0 --make-vocab-size-divisible-by 4
""".split()
TWO_STAGES = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2".split()
# Upstream pads the vocabulary to a multiple of this times TP: to 260, as without TP.
TENSOR_PARALLEL = """
    --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 2
""".split()
MTP = ["--mtp-num-layers", "1"]
UNTIE = "--untie-embeddings-and-output-weights"
SHARDED = ["--use-distributed-optimizer"]
OVERLAPPED = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
UNALIGNED = [*OVERLAPPED, "--no-align-grad-reduce", "--no-align-param-gather"]

CHUNKS = ["--num-virtual-stages-per-pipeline-rank", "2"]
SCHEDULES = {
    "1f1b": ["--cf-schedule", "1f1b"],
    "interleaved": ["--cf-schedule", "interleaved", *CHUNKS],
    "dualpipev": ["--cf-schedule", "dualpipev"],
}
DUALPIPE = ["--cf-schedule", "dualpipe"]


def list_base_flags(text: Path | None, directory: Path) -> list[str]:
    """Return the flags that all trainings have, on this text or on Megatron's mock data; none of them is of a layout."""
    flags = drop_flags([*read_flags("deepseek-v3-small.args"), *read_flags("cpu.args")], *SHARDED)
    data = ["--data-path", str(text)] if text else ["--mock-data"]
    return [*flags, *SMALL, *data, "--data-cache-path", str(directory / "cache")]


def drop_flags(flags: list[str], *dropped: str) -> list[str]:
    """Take flags with their values out of a command line."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word in dropped
        if not dropping:
            kept.append(word)
    return kept


def save_to(folder: Path, interval: int) -> list[str]:
    """Return the flags that save a checkpoint every so many steps."""
    return ["--save", str(folder), "--save-interval", str(interval)]


def start_from(folder: Path) -> list[str]:
    """Return the flags that start a training from the weights of a checkpoint."""
    return ["--load", str(folder), "--finetune", "--no-load-optim", "--no-load-rng"]


def resume_from(folder: Path, step: int) -> list[str]:
    """Return the flags that go on with a training after a step."""
    return ["--load", str(folder), "--ckpt-step", str(step)]


class Cases(list[Case]):
    """Trainings, in an order in which each finds the checkpoint that it starts from; a case saves in a folder of its name."""

    def __init__(self, directory: Path, base: list[str], steps: int) -> None:
        super().__init__()
        self._directory, self._base, self._steps = directory, base, steps

    def add(
        self,
        name: str,
        *flags: list[str],
        plugin: bool = True,
        steps: int = 0,
        save: int = 0,
        without: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        """Add a case with flags of its own; it saves every ``save`` steps, has no flag of ``without``, and further keys."""
        whole = [*self._base, "--train-iters", str(steps or self._steps), *(flag for some in flags for flag in some)]
        whole += save_to(self._directory / name, save) if save else []
        self.append({"name": name, "plugin": plugin, "flags": drop_flags(whole, *without), **more})

    def start_from(self, name: str) -> list[str]:
        """Return the flags that start from the weights that a case has saved."""
        return start_from(self._directory / name)

    def resume_from(self, name: str, step: int) -> list[str]:
        """Return the flags that go on with a case after a step that it has saved."""
        return resume_from(self._directory / name, step)
