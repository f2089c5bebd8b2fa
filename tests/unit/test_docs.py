"""What the documentation shows runs and prints what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.made_record import make_record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def find_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_adding_a_schedule_works_as_the_page_says(tmp_path: Path) -> None:
    page = "docs/add-a-schedule.md"
    (code,), (expected,), (console,) = (find_blocks(page, language) for language in ("python", "text", "console"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == expected
    (command,) = re.findall(r"^\$ counterflow (.*)$", console, flags=re.MULTILINE)
    subprocess.run(
        [sys.executable, "-m", "counterflow.commands.main", *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "gpipe-lifo.html").stat().st_size > 10_000


@pytest.mark.parametrize("page", ["docs/schedules.md", "docs/reports.md", "README.md"])
def test_schedule_commands_in_the_docs_are_understood(page: str, tmp_path: Path) -> None:
    for block in find_blocks(page, "console"):
        for command in re.findall(r"^\$ counterflow (schedule .*)$", block, flags=re.MULTILINE):
            if "search" in command:
                command += " --seconds 0.2"
            subprocess.run(
                [sys.executable, "-m", "counterflow.commands.main", *shlex.split(command)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            )


def test_balance_commands_in_the_docs_are_understood(tmp_path: Path) -> None:
    np.savez(tmp_path / "loads.npz", loads=np.random.default_rng(0).lognormal(0, 1, (2, 256)))
    trace = (ROOT / "examples" / "routing.npz").read_bytes()
    for name in ("trace.npz", "routing_a.npz", "examples/routing.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(trace)
    make_record(tmp_path / "runs" / "record", {0: [1, 2], 4: [3, 4]}, range(1, 31))
    commands = [
        command
        for page in ("docs/balance.md", "README.md")
        for block in find_blocks(page, "console")
        for command in re.findall(r"^\$ counterflow (balance .*)$", block, flags=re.MULTILINE)
    ]
    assert len(commands) >= 7
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "counterflow.commands.main", *shlex.split(command)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
