"""One rank of a training with overlapped pairs in which rank 1 breaks down inside a pair, in a router's forward or backward."""

import os
import signal
import time
from functools import wraps
from typing import Any

import torch

import worker
from counterflow.runtime.handover import find_flow

BROKEN = 1


def break_down(how: str) -> None:
    """Go wrong as asked."""
    match how:
        case "error":
            raise RuntimeError("the router broke")
        case "interrupt":
            raise KeyboardInterrupt
        case "killed":
            time.sleep(1.5)  # long enough to have been heard of
            os.kill(os.getpid(), signal.SIGKILL)


def is_in_pair(kinds: str) -> bool:
    flow = find_flow()
    return flow is not None and flow.other is not None and flow.action.kind in kinds


def run(argument: dict[str, Any]) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    case, forward = argument["case"], TopKRouter.forward
    how, part = case["breaks"]

    def break_backward(gradient: torch.Tensor) -> None:
        if is_in_pair("BI"):
            break_down(how)

    @wraps(forward)
    def routed(router: Any, *args: Any, **kwargs: Any) -> Any:
        if part == "F" and is_in_pair("F"):
            break_down(how)
        probs, *others = forward(router, *args, **kwargs)
        if part == "B" and probs.requires_grad:
            probs.register_hook(break_backward)
        return probs, *others

    if int(os.environ["RANK"]) == BROKEN:
        TopKRouter.forward = routed
    worker.run(argument)
