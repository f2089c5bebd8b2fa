"""What is compiled is kept, and made anew when a file that it calls has changed."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.running import run_python

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "plugin" / "counterflow"
CALLER = """
from counterflow.callee import give
from counterflow.compiling import compile_fast, is_compiled

@compile_fast
def ask():
    return give()

known = is_compiled(ask)
print(ask(), sum(ask.stats.cache_hits.values()), known)
"""
CALLEE = "from counterflow.compiling import compile_fast\n\n@compile_fast\ndef give():\n    return {}\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with the compiler and nothing to compile yet."""
    package = tmp_path / "counterflow"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(PACKAGE / "compiling.py", package)
    return package


def call(package: Path) -> str:
    """What the caller prints in a process of its own: the value, hits of the cache, whether it was compiled before."""
    return run_python("-c", "import counterflow.caller", cwd=package.parent).strip()


def test_a_change_in_a_called_file_is_seen(package: Path) -> None:
    (package / "caller.py").write_text(CALLER)
    (package / "callee.py").write_text(CALLEE.format(1))
    assert call(package) == "1 0 False", "compiled at first"
    assert call(package) == "1 1 True", "kept"
    (package / "callee.py").write_text(CALLEE.format(22))
    assert call(package) == "22 0 False", "compiled again after the change"
    (package / "other.py").write_text("# holds no kernel\n")
    (package / "callee.py").touch()
    assert call(package) == "22 1 True", "kept, whatever else is edited"


def test_a_change_of_what_a_kernel_reads_is_seen(package: Path) -> None:
    (package / "caller.py").write_text(CALLER.replace("callee import give", "constants import VALUE").replace("give()", "VALUE"))
    for value in ("3", "4"):
        (package / "constants.py").write_text(f"VALUE = {value}\n")
        assert call(package) == f"{value} 0 False"


def test_without_the_compiler_all_runs_as_plain_python() -> None:
    code = (
        "import numpy as np; from counterflow.balance import make_home_placement, plan_clones; "
        "print((plan_clones(np.arange(1, 9.0)[None], make_home_placement(1, 8, 4, 1)).after < 1.05).all())"
    )
    assert run_python("-c", code, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}).strip() == "True"
