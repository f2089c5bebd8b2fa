"""Files that a command writes: refused before any work where they cannot be, and in one line where the disk says no."""

from pathlib import Path

from counterflow.errors import CounterflowError, OptionError


def check_output(option: str, path: Path) -> None:
    """Raise `OptionError` that names the option where no file can be at that path."""
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir()
    except OSError as error:
        raise OptionError(f"{option} {path} cannot be written: {error.strerror}") from None
    if is_folder:
        raise OptionError(f"{option} {path} is a folder; give the path of a file")
    if not has_folder:
        raise OptionError(f"{option} {path} cannot be written: there is no folder {path.parent}; make it first")


def write_output(option: str, path: Path, content: str | bytes) -> None:
    """Write text in UTF-8, or bytes; raises `CounterflowError` that names the option."""
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CounterflowError(f"{option} {path} cannot be written: {error.strerror}") from None
