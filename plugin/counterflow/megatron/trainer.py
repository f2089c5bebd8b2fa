"""Whose loop trains: ``megatron.training``, whose arguments say everything, or one of the user's own over ``megatron.core``."""

import sys
from typing import Any


def find_arguments() -> Any | None:
    """Return the arguments of ``megatron.training``, once the plugin has seen them; None in another loop."""
    home = sys.modules.get("megatron.training.global_vars")
    args = getattr(home, "_GLOBAL_ARGS", None)
    return args if hasattr(args, "cf_platform") else None
