"""One rank of the training tests: runs many training cases in one process group.

Usage: worker.py CASES.json RESULTS.json. A case is {"name", "flags", "plugin"}; each runs the example's
unmodified Megatron script (or its "script"), with what it logged per step collected by the last rank.
Its "files" are written first.
"""

import gc
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import counterflow
from counterflow.platform import install_cpu

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_moe" / "pretrain_moe.py"


class Log:
    """What Megatron's loop handed to its own logging and evaluation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[float] = []
        self.sharing: list[str] = []

    def attach(self) -> None:
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
        from megatron.training import training

        log, evaluate, set_up = training.training_log, training.evaluate, training.setup_model_and_optimizer

        def checked_setup(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, *others = set_up(*args, **kwargs)
            self.sharing = find_sharing(model, optimizer)
            return model, optimizer, *others

        def training_log(loss_dict: Any, total: Any, lr: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
            loss = float(loss_dict["lm loss"]) if loss_dict else float("nan")
            predicted = MTPLossLoggingHelper.tracker.get("loss_values")
            self.steps.append(
                {
                    "iteration": iteration,
                    "loss": loss,
                    # Positions: loss_scale, report_memory_flag, skipped_iter, grad_norm.
                    "grad_norm": float(args[3]) if args[3] is not None else float("nan"),
                    "skipped": int(args[2]),
                    "mtp_loss": float(predicted.sum()) if predicted is not None else None,
                }
            )
            return log(loss_dict, total, lr, iteration, *args, **kwargs)

        def logged_evaluate(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            self.evaluations += [float(value) for key, value in (result[0] or {}).items() if key == "lm loss"]
            return result

        training.training_log, training.evaluate = training_log, logged_evaluate
        training.setup_model_and_optimizer = checked_setup
        self._originals = (log, evaluate, set_up)

    def detach(self) -> None:
        from megatron.training import training

        training.training_log, training.evaluate, training.setup_model_and_optimizer = self._originals


def find_sharing(model: list[Any], optimizer: Any) -> list[str]:
    """Name, over all ranks, what lies in the same memory: two parameters, or two tensors of what an optimizer keeps for them."""
    names = {parameter: name for chunk in model for name, parameter in chunk.named_parameters()}
    parameters = [(name, parameter.data) for parameter, name in names.items()]
    kept: list[tuple[str, torch.Tensor]] = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", None)
        owned = [parameter for group in inner.param_groups for parameter in group["params"]] if inner is not None else []
        for parameter in owned:
            name = names.get(parameter, f"master {tuple(parameter.shape)}")
            state = inner.state.get(parameter, {})
            tensors = {"": parameter.data, **{key: value for key, value in state.items() if torch.is_tensor(value)}}
            kept += [(f"{name} {key}", tensor) for key, tensor in tensors.items()]
    found = [*_find_overlaps(parameters), *_find_overlaps(kept)]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return [f"rank {rank}: {pair}" for rank, pairs in enumerate(gathered) for pair in pairs]


def _find_overlaps(named: list[tuple[str, torch.Tensor]]) -> list[str]:
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name) for name, t in named if t.numel())
    return [f"{one[2]} and {other[2]}" for one, other in zip(ranges, ranges[1:], strict=False) if other[0] < one[1]]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one training; return its log, or the exception that ended it."""
    script = case.get("script", str(SCRIPT))
    sys.argv = [script, *case["flags"]]
    for path, text in case.get("files", {}).items():
        write_at_once(Path(path), text)
    patches = counterflow.enable() if case["plugin"] else install_cpu()
    log = Log()
    log.attach()
    error, begin = None, time.perf_counter()
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as caught:
        if not case.get("may_fail"):
            raise
        # Ranks may fail differently; the one that writes the results knows only its own.
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
    log.detach()
    forget_megatron()
    patches.undo()
    seconds = round(time.perf_counter() - begin, 1)
    return {
        "name": case["name"],
        "steps": log.steps,
        "evaluations": log.evaluations,
        "sharing": log.sharing,
        "error": error,
        "seconds": seconds,
    }


def write_at_once(path: Path, text: str) -> None:
    """Write a file that other ranks write too, and read: no one sees a part of it."""
    made = path.with_suffix(f".{os.getpid()}")
    made.write_text(text)
    made.replace(path)


def forget_megatron() -> None:
    """Put Megatron's process-wide state back to what it is after import; keep the world group."""
    from megatron.core import parallel_state
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training.training import destroy_global_state
    from torch.distributed import distributed_c10d as c10d

    destroy_global_state()
    MTPLossLoggingHelper.tracker.clear()
    parallel_state.set_pipeline_model_parallel_rank(None)
    torch.distributed.barrier()
    for group in list(c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()


def main() -> None:
    cases, results = Path(sys.argv[1]), Path(sys.argv[2])
    done = []
    for case in json.loads(cases.read_text()):
        done.append(run_case(case))
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            results.write_text(json.dumps(done))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
