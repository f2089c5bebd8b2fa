"""Compiles inner loops; importing this loads the compiler."""

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

PACKAGE = Path(__file__).parent


def compile_fast[Function: Callable[..., Any]](function: Function) -> Function:
    """Compile a function, once per installation and again when a file that holds compiled functions has other contents.

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
def stamp_sources() -> str:
    """Return a digest of the contents of the files that hold compiled functions, and of those whose names these import."""
    texts = {file.relative_to(PACKAGE): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    due = [file for file, text in texts.items() if "@compile_fast" in text]
    reached: set[Path] = set()
    while due:
        file = due.pop()
        if file in texts and file not in reached:
            reached.add(file)
            modules = re.findall(r"^ *from counterflow\.([\w.]+) import", texts[file], re.MULTILINE)
            due += [Path(*module.split(".")).with_suffix(".py") for module in modules]
            due += [Path(*module.split("."), "__init__.py") for module in modules]
    digest = hashlib.sha256()
    for file in sorted(reached):
        digest.update(f"{file}\0{texts[file]}\0".encode())
    return digest.hexdigest()
