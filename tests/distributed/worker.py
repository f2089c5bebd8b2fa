"""One rank of a training case: runs the example's unmodified Megatron script and collects what it logged per step.

A case is {"name", "flags", "plugin"}, and may have a "script" of its own, "files" that are written first, and the "platform" cuda
in place of the CPU.
"""

import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import counterflow
from counterflow.platform import install_cpu
from counterflow.platform.engine import asks_for_engine

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_moe" / "pretrain_moe.py"


def average_over_replicas(values: torch.Tensor | None) -> torch.Tensor | None:
    """Average what each replica has of a loss, as Megatron does before it logs it: a replica may compute another's part."""
    if values is None:
        return None
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    total = values.clone()
    torch.distributed.all_reduce(total, group=group)
    return total / group.size()


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
            predicted = average_over_replicas(MTPLossLoggingHelper.tracker.get("loss_values"))
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


def run_case(case: dict[str, Any], around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> dict[str, Any]:
    """Run one training inside a block of ``around``; return its log, what the block gave ("inside"), or what ended it."""
    script = case.get("script", str(SCRIPT))
    sys.argv = [script, *case["flags"]]
    for path, text in case.get("files", {}).items():
        write_at_once(Path(path), text)
    on_gpus = case.get("platform") == "cuda"
    if case["plugin"]:
        counterflow.enable()
    elif not on_gpus:
        install_cpu(engine=asks_for_engine(case["flags"]))
    if on_gpus:
        keep_helpers()
    log = Log()
    log.attach()
    error, inside, begin = None, None, time.perf_counter()
    try:
        with around() as inside:
            runpy.run_path(script, run_name="__main__")
    except Exception as caught:
        if not case.get("may_fail"):
            raise
        # Ranks may fail differently; the one that writes the results knows only its own.
        traceback.print_exc()
        error = f"{type(caught).__name__}: {caught}"
    seconds = round(time.perf_counter() - begin, 1)
    return {
        "name": case["name"],
        "steps": log.steps,
        "evaluations": log.evaluations,
        "sharing": log.sharing,
        "error": error,
        "seconds": seconds,
        "inside": inside,
    }


def keep_helpers() -> None:
    """Let Megatron not compile the helper of its data sets, which its wheel ships built: it has no makefile."""
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def write_at_once(path: Path, text: str) -> None:
    """Write a file that other ranks write too, and read: no one sees a part of it."""
    made = path.with_suffix(f".{os.getpid()}")
    made.write_text(text)
    made.replace(path)


def run(job: dict[str, Any]) -> None:
    """Run the job's case; the last rank writes what it logged."""
    prepare_writer(job["case"])
    write_result(job, run_case(job["case"]))


def prepare_writer(case: dict[str, Any]) -> None:
    """Let the manager of Megatron's checkpoint writer be a fork, before a socket is open that it would hold open.

    A new process would import the training script once more, on every rank.
    """
    if "--save" in case["flags"]:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        # Megatron 0.17 has it under another name.
        if (get_queue := getattr(filesystem_async, "get_write_results_queue", None)) is not None:
            get_queue(mp_mode="fork")


def write_result(job: dict[str, Any], result: dict[str, Any]) -> None:
    """Write a case's result on the last rank, and end together."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        Path(job["results"]).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
