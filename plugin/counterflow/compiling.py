"""Compiles inner loops; importing this loads the compiler."""

from collections.abc import Callable
from typing import Any

import numba


def compile_fast[Function: Callable[..., Any]](function: Function) -> Function:
    """Compile a function, once per installation."""
    compiled: Function = numba.njit(cache=True)(function)
    return compiled
