"""Files that a command writes: refused before any work where they cannot be, and in one line where the disk says no."""

import os
from pathlib import Path

from counterflow.errors import CounterflowError, OptionError


def check_output(option: str, path: Path) -> None:
    """Raise `OptionError` that names the option where no file can be at that path, or none that we may write."""
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir()
        target = path if os.access(path, os.F_OK) else path.parent
        may_write = os.access(target, os.W_OK)
    # A name that no file can have is a ValueError.
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"{option} {path} cannot be written: {reason}") from None
    if is_folder:
        raise OptionError(f"{option} {path} is a folder; give the path of a file")
    if not has_folder:
        raise OptionError(f"{option} {path} cannot be written: there is no folder {path.parent}; make it first")
    if not may_write:
        raise OptionError(f"{option} {path} cannot be written: no permission to write to {target}; give another path")


def write_output(option: str, path: Path, content: str | bytes) -> None:
    """Write text in UTF-8, or bytes; raises `CounterflowError` that names the option."""
    try:
        # Not to wait for a reader of a pipe that has none.
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666)) as file:
            os.set_blocking(file.fileno(), True)
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CounterflowError(f"{option} {path} cannot be written: {error.strerror}") from None
