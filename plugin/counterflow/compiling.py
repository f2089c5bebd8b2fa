"""Compiles inner loops; importing this loads the compiler."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

PACKAGE = Path(__file__).parent


def compile_fast[Function: Callable[..., Any]](function: Function) -> Function:
    """Compile a function, once per installation and again when any file of the package has changed.

    It runs without Python's lock, so that a plan is made beside a training step.
    """
    compiled: Any = numba.njit(cache=True, nogil=True)(function)
    if not numba.config.DISABLE_JIT:
        # Left to itself, numba looks at the function's own file alone, and would go on with what it called in another before.
        compiled._cache._cache_file._source_stamp = stamp_sources()
    result: Function = compiled
    return result


def is_compiled(function: Any) -> bool:
    """Tell whether a function by `compile_fast` need not be compiled any more, as it is once per installation."""
    return bool(numba.config.DISABLE_JIT or function._cache._cache_file._load_index())


@cache
def stamp_sources() -> tuple[tuple[str, int, int], ...]:
    """Return the name, the time of the last change and the size of every source file of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return tuple((str(file.relative_to(PACKAGE)), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
