"""A search in a process of its own answers, or says how it failed, and outlives nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow.schedule import Costs, ScheduleError, build, lay_v, simulate, to_csv
from counterflow.schedule import search_process as module
from counterflow.schedule.search_process import LOWEST_PRIORITY, SearchProcess, Task

pytestmark = pytest.mark.slow

# Shorter than ZB-V by 2.6 %.
COSTS = Costs(1.0, 1.5, 0.5)
QUICK = Task("zbv", 2, 6, COSTS, 2.5, 0.5)
LONG = replace(QUICK, seconds=300.0)


@pytest.fixture(autouse=True)
def _ordinary_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other tests run beside these, what has the lowest priority may not run at all."""
    monkeypatch.setattr(module, "LOWEST_PRIORITY", 0)


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


def is_there(pid: int) -> bool:
    """Tell whether a process runs, or has ended and nobody has taken note."""
    return Path(f"/proc/{pid}").exists()


def find_pid(search: SearchProcess) -> int:
    return search._process.pid


def test_a_search_has_low_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOWEST_PRIORITY", LOWEST_PRIORITY)
    search = SearchProcess(LONG)
    assert os.getpriority(os.PRIO_PROCESS, find_pid(search)) == LOWEST_PRIORITY == 19


def test_a_search_answers_from_a_process_without_torch() -> None:
    search = SearchProcess(QUICK)
    libraries = set()
    while not search.is_done():
        libraries |= {line.rpartition("/")[2] for line in Path(f"/proc/{find_pid(search)}/maps").read_text().splitlines()}
        time.sleep(0.05)
    assert any("numba" in name or "llvm" in name for name in libraries)
    assert not any("torch" in name for name in libraries)
    answer = search.read()
    assert answer.table.layout == lay_v(2) and answer.table.microbatches == 6
    assert answer.makespan == pytest.approx(simulate(answer.table, COSTS).makespan)
    assert answer.family_makespan == pytest.approx(simulate(build("zbv", 2, 6), COSTS).makespan)
    assert answer.gain == pytest.approx(1 - answer.makespan / answer.family_makespan) and answer.gain > 0.02
    assert not is_there(find_pid(search))


def test_a_search_that_is_killed_says_so() -> None:
    search = SearchProcess(LONG)
    os.kill(find_pid(search), signal.SIGKILL)
    assert wait_until(search.is_done)
    with pytest.raises(ScheduleError, match=r"^exit status -9 after \d+ s, no word$"):
        search.read()


def test_a_search_that_raises_says_what() -> None:
    search = SearchProcess(replace(QUICK, max_activations=0.0))
    assert wait_until(search.is_done)
    with pytest.raises(ScheduleError, match=r"^exit status 1 after \d+ s, .*a cap of 0\.0 activations given"):
        search.read()


def test_a_search_that_takes_far_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    search = SearchProcess(LONG)
    assert not search.is_done()
    monkeypatch.setattr(module, "MOST_SECONDS", 0.0)
    assert search.is_done()
    with pytest.raises(ScheduleError, match="exit status -9"):
        search.read()


ANSWER = {
    "table": to_csv(build("zbv", 2, 6)),
    "makespan": 1,
    "bubble": 0,
    "activations": 1,
    "family_makespan": 2,
    "family_bubble": 0,
}
WRONG = {
    "nothing": ("", "cannot be read"),
    "noise": ("\0\1 <html>", "cannot be read"),
    "another thing": ("[1, 2]", "cannot be read"),
    "without figures": (json.dumps({"table": ANSWER["table"]}), "cannot be read"),
    "without a table": (json.dumps({**ANSWER, "table": None}), "cannot be read"),
    "half a table": (json.dumps({**ANSWER, "table": ANSWER["table"][:40]}), "cannot be read: ScheduleError"),
    "for others": (json.dumps({**ANSWER, "table": to_csv(build("zbv", 2, 8))}), "a table of 2 ranks, 8 micro-batches"),
    "another layout": (json.dumps({**ANSWER, "table": to_csv(build("1f1b", 2, 6))}), "layout straight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_none_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, said = WRONG[name]
    (tmp_path / "answer").write_text(text)
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexec cat {tmp_path / 'answer'}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    search = SearchProcess(QUICK)
    assert wait_until(search.is_done)
    with pytest.raises(ScheduleError, match=said):
        search.read()


def test_a_search_ends_when_it_is_let_go_of() -> None:
    search = SearchProcess(LONG)
    pid = find_pid(search)
    del search
    assert not is_there(pid), "it runs, or is a zombie"


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit"])
def test_a_search_ends_with_its_parent(end: str, tmp_path: Path) -> None:
    code = f"""
import os, signal
from test_search_process import LONG, SearchProcess, find_pid
search = SearchProcess(LONG)
print(find_pid(search), flush=True)
{end}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip().isdigit(), done.stderr
    assert wait_until(lambda: not is_there(int(done.stdout)), 30.0)
