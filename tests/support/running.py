"""Commands and programs run as a user runs them, in this process or in one of their own, and what is refused."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from counterflow.commands.main import main
from counterflow.errors import CounterflowError


def run_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Return status, output and errors of ``counterflow`` with these words."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    said = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 1), said.out, said.err


def check_refusal(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input: status 2, no output, one line that says so."""
    code, out, err = run_command(argv, capsys)
    assert (code, out) == (2, "")
    assert said in err and err.startswith("counterflow: ") and err.count("\n") == 1


def run_python(*words: object, **how: Any) -> str:
    """Return what Python prints in a process of its own, which has to end well."""
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


def load_module(path: Path) -> ModuleType:
    """Return what a script defines; it lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def refuses(said: str, error: type[Exception] = CounterflowError) -> Iterator[None]:
    """The block raises an error of one line that says so."""
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert said in message and "\n" not in message
