"""What is compiled is kept, and made anew when a file that it calls has changed."""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "plugin" / "counterflow"
CALLER = """
from counterflow.callee import give
from counterflow.compiling import compile_fast

@compile_fast
def ask():
    return give()

print(ask(), sum(ask.stats.cache_hits.values()))
"""
CALLEE = "from counterflow.compiling import compile_fast\n\n@compile_fast\ndef give():\n    return {}\n"


def test_a_change_in_a_called_file_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "counterflow"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(PACKAGE / "compiling.py", package)
    (package / "caller.py").write_text(CALLER)

    def run() -> str:
        command = [sys.executable, "-c", "import counterflow.caller"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()

    (package / "callee.py").write_text(CALLEE.format(1))
    assert run() == "1 0", "compiled at first"
    assert run() == "1 1", "kept"
    (package / "callee.py").write_text(CALLEE.format(22))
    assert run() == "22 0", "compiled again after the change"
