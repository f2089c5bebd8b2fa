"""Find out which loop trains: ``megatron.training``, which has global arguments, or another one over ``megatron.core``."""

import sys
from typing import Any


def find_arguments() -> Any | None:
    """Return the arguments of ``megatron.training`` once they are parsed with the plugin's flags; None in another loop."""
    home = sys.modules.get("megatron.training.global_vars")
    args = getattr(home, "_GLOBAL_ARGS", None)
    return args if hasattr(args, "cf_platform") else None


def number_iteration(done: int, *, forward_only: bool = False) -> int:
    """Return the number of the running training step, from 1; during an evaluation, that of the last step before it.

    Records, the watch and expert balancing use this number. Under ``megatron.training`` it is the number in Megatron's log: a
    resumed run goes on counting, and a step that is run again keeps its number. In another loop it is ``done`` + 1, where
    ``done`` is the number of training steps that the caller has seen in this process.
    """
    args = find_arguments()
    if forward_only and not done:
        return int(getattr(args, "iteration", 0))
    return int(getattr(args, "curr_iteration", done - forward_only)) + 1
