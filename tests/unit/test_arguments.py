"""How a command ends: by a result, by one line, at Ctrl-C, when nobody reads its output, or where it may not write."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.commands.arguments import INTERRUPTED, NO_READER, number, numbers, run_command, whole
from counterflow.errors import BalanceError, CounterflowError, OptionError, ScheduleError
from counterflow.report.files import check_output, write_output
from counterflow.schedule import Costs, build
from counterflow.schedule.layouts import lay_bidirectional, lay_v
from counterflow.schedule.search import search


@pytest.mark.parametrize("text", ["", "x", "1.5", "nan", "0", "9", "9" * 5000, "-1", "1e3"])
def test_what_is_no_whole_number_within_bounds_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="given; allowed: a whole number from 1 to 8$"):
        whole(1, 8)(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "1e300", "1e400", "9" * 5000, "1,2"])
def test_what_is_no_number_within_bounds_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="given; allowed: a finite number from 0 to 8"):
        number(0, 8)(text)


def test_numbers_within_bounds_are_read() -> None:
    assert (whole(1, 8)("8"), whole()("0"), number()("1e3"), numbers()("2"), numbers()("1,2.5")) == (8, 0, 1000, 2, (1, 2.5))


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "counterflow: interrupted\n"),
        (BrokenPipeError(), NO_READER, ""),
        (OSError(28, "No space left on device"), 2, "counterflow: the output cannot be written: No space left on device\n"),
        (CounterflowError("a\nb\x1b[31m"), 2, "counterflow: a\\nb\\x1b[31m\n"),
    ],
)
def test_what_ends_a_command_is_said_in_one_line(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise raised

    assert run_command(run) == code
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    show = "-m counterflow.commands.main schedule show 1f1b --ranks 64 --microbatches 64"
    command = [sys.executable, *show.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == NO_READER


def test_an_output_that_may_not_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there.html"
    there.touch()
    check_output("--html", there)
    # Tests may run as root, who may write everything.
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and Path(path).exists())
    for path, target in ((there, there), (tmp_path / "new.html", tmp_path)):
        with pytest.raises(OptionError, match=f"--html {path} cannot be written: no permission to write to {target}; give"):
            check_output("--html", path)


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CounterflowError, match="--csv .*pipe cannot be written: No such device"):
        write_output("--csv", tmp_path / "pipe", "0F0")
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(OptionError, match="cannot be written"):
            check_output("--csv", path)


@pytest.mark.parametrize("ranks", [0, -1, 1.5, None, "2", 10**30, float("nan")])
def test_sizes_that_are_none_are_named(ranks: Any) -> None:
    for make in (lambda: build("1f1b", ranks, 8), lambda: build("1f1b", 8, ranks), lambda: search(ranks, 8, Costs())):
        with pytest.raises(ScheduleError, match=r"given; allowed: a whole number from 1 to"):
            make()
    if ranks != 10**30:
        for lay in (lay_v, lay_bidirectional):
            with pytest.raises(ScheduleError, match="ranks .* given; allowed: a whole number"):
                lay(ranks)


def test_more_runs_than_memory_holds_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"100000 ranks x 100000 micro-batches x 2 chunks given, 20,000,000,000 runs"):
        build("dualpipev", 100_000, 100_000)


@pytest.mark.parametrize(
    "given", [{"f": "x"}, {"f": None}, {"p2p": [1]}, {"w": 1e300}, {"i": 1e-300}, {"overlap": "1"}, {"f": [1, -1]}]
)
def test_costs_that_cannot_be_computed_with_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="given; allowed: "):
        Costs(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"costs": Costs(0, 0, 0)}, "costs f, i and w of 0 given"),
        ({"seconds": float("nan")}, "search: seconds nan given"),
        ({"seconds": -1}, "search: seconds -1 given"),
        ({"max_activations": float("nan")}, "a cap of nan activations given"),
        ({"max_chunks": 10_000}, "2 ranks x 10000 chunks given; allowed: 1024 stages at most"),
    ],
)
def test_a_search_for_nothing_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        search(**{"ranks": 2, "microbatches": 8, "costs": Costs()} | given)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_search_does_not_mind_the_unit(scale: float) -> None:
    plain = search(2, 6, Costs(overlap=0.8), seconds=0)
    scaled = search(2, 6, Costs(scale, scale, scale, overlap=0.8), seconds=0)
    assert np.isclose(scaled.timeline.makespan, plain.timeline.makespan * scale)
    assert np.isclose(scaled.lower_bound, plain.lower_bound * scale)


def test_a_plan_for_no_whole_number_is_refused() -> None:
    from counterflow.balance import make_cluster, plan_placement

    with pytest.raises(BalanceError, match="ranks 2.5 given; allowed: a whole number from 1"):
        make_cluster(2.5, 8)  # type: ignore[arg-type]
    with pytest.raises(BalanceError, match="traffic weight nan given"):
        plan_placement(np.ones((1, 8)), make_cluster(2, 8), traffic_weight=float("nan"))
