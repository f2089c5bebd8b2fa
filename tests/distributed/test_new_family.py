"""A family is one file and its name in a list: made as the docs say, in a copy of the plugin, it trains like the others."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.comparing import assert_same_steps
from tests.support.run_cases import Runs
from tests.support.running import run_python
from tests.support.training import Cases, list_base_flags


@pytest.fixture
def copied_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plugin with one file and one name more, first on Python's path."""
    plugin = tmp_path / "plugin"
    shutil.copytree(ROOT / "plugin" / "counterflow", plugin / "counterflow", ignore=shutil.ignore_patterns("__pycache__"))
    families = plugin / "counterflow" / "schedule" / "families"
    first, value = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-schedule.md").read_text(), flags=re.DOTALL)
    function = first[: first.index("\n\ntable = ")].replace(
        "from counterflow.schedule import Action, Costs, ScheduleTable, build, lay_straight, simulate, to_csv, validate",
        "from counterflow.schedule.actions import Action\n"
        "from counterflow.schedule.layouts import lay_straight\n"
        "from counterflow.schedule.table import ScheduleTable",
    )
    (families / "gpipe_lifo.py").write_text(f"{function}\n\n{value}")
    register = families / "__init__.py"
    text = register.read_text()
    text = text.replace(", DUALPIPE)}", ", DUALPIPE, GPIPE_LIFO)}", 1)
    text = text.replace(
        "from counterflow.schedule.table",
        "from counterflow.schedule.families.gpipe_lifo import GPIPE_LIFO\nfrom counterflow.schedule.table",
    )
    register.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    return plugin


def test_a_family_made_as_the_docs_say_is_known_and_trains(copied_plugin: Path, text: Path, tmp_path: Path) -> None:
    cases = Cases(tmp_path, list_base_flags(text, tmp_path), steps=2)
    for name in ("1f1b", "gpipe-lifo"):
        cases.add(name, ["--pipeline-model-parallel-size", "2", "--cf-schedule", name])
    runs = Runs("worker", cases, tmp_path, ranks=2)
    assert [step["iteration"] for step in runs["gpipe-lifo"]["steps"]] == [1, 2]
    assert_same_steps(runs["gpipe-lifo"], runs["1f1b"])

    compare = "-m counterflow.commands.main schedule compare --ranks 2 --microbatches 4"
    assert "gpipe-lifo" in run_python(*compare.split())
    code = "import counterflow.options as o; print(o.describe_options()); o.read_flags(['--cf-schedule', 'none'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "dualpipe, gpipe-lifo, auto" in done.stdout, "the flag's help does not name it"
    assert "allowed: gpipe, 1f1b, interleaved, zb-h1, zbv, dualpipev, dualpipe, gpipe-lifo, auto" in done.stderr
