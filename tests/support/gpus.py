"""Ranks on the GPUs of this machine, forked as those on the CPU (`forked_ranks.py`); several ranks may share one GPU."""

import importlib.util
from pathlib import Path

import torch

from tests.support.run_cases import RANKS, Case, Run, Runs, run_case
from tests.support.training import drop_flags

# What the CPU alone needs.
OF_THE_CPU = ("--distributed-backend", "--cf-platform", "--use-cpu-initialization")


def count_gpus() -> int:
    """Count the GPUs without a CUDA context, which would keep this process's forks from having one."""
    return torch.cuda.device_count()


def place_rank(rank: int, ranks: int, gpus: int) -> dict[str, str]:
    """Return the environment that gives a rank its GPU.

    NCCL takes no two ranks of one host on one GPU. So ranks that share GPUs say that they are on hosts of their own, and meet
    over the loopback interface. Kernels are loaded before a transfer can wait on the GPU (docs/gpus.md).
    """
    own = {"LOCAL_RANK": str(rank % gpus), "CUDA_MODULE_LOADING": "EAGER"}
    return own if gpus >= ranks else {**own, "NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo"}


class RunsOnGpus(Runs):
    """What each case logged on GPUs, by its name."""

    def run(self, case: Case) -> Run:
        """Run one case on the machine's GPUs."""
        flags = drop_flags(case["flags"], *OF_THE_CPU)
        # Megatron's own linears add weight gradients by Apex's kernel.
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
            flags = [*drop_flags(flags, "--no-gradient-accumulation-fusion"), "--no-gradient-accumulation-fusion"]
        moved = {key: value for key, value in case.items() if key != "capability"}
        return run_case(self._worker, {**moved, "flags": flags, "platform": "cuda"}, self._directory, self._ranks)


def make_runs(worker: str, cases: list[Case], directory: Path) -> RunsOnGpus:
    """Return the runs of these cases on four ranks."""
    return RunsOnGpus(worker, cases, directory, RANKS)
