"""Whose loop trains: ``megatron.training``, whose arguments say everything, or one of the user's own over ``megatron.core``."""

import sys
from typing import Any


def find_arguments() -> Any | None:
    """Return the arguments of ``megatron.training``, once the plugin has seen them; None in another loop."""
    home = sys.modules.get("megatron.training.global_vars")
    args = getattr(home, "_GLOBAL_ARGS", None)
    return args if hasattr(args, "cf_platform") else None


def number_iteration(done: int, *, forward_only: bool = False) -> int:
    """Return the number, from 1, of the training iteration that runs; of an evaluation, that of the last one before it.

    Records, the watch and expert balancing all count by it. Where ``megatron.training`` trains, the number is its own, as its log
    has it: a resumed run goes on counting, and a step that is run again keeps its number. In another loop it is ``done``, the
    training steps that the caller has seen in this process, and 1.
    """
    args = find_arguments()
    if forward_only and not done:
        return int(getattr(args, "iteration", 0))
    return int(getattr(args, "curr_iteration", done - forward_only)) + 1
