"""Command lines and option sets drawn at random, over all commands and options: a result, or one line that says what is wrong.

Other draws: ``HOSTILE_SEED=7 HOSTILE_DRAWS=2000 python -m pytest tests/unit/test_hostile_commands.py``.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from counterflow.balance import rebalance_experts
from counterflow.commands.main import build_parser, main
from counterflow.errors import OptionError
from counterflow.options import Options, add_flags, merge_options, read_flags, read_values
from counterflow.schedule import Costs
from tests.support.hostile import LIMIT_SECONDS, Files, draw_flags, draw_line, draw_mapping, find_fault, make_files, run_line

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("HOSTILE_SEED", "0"))
DRAWS = int(os.environ.get("HOSTILE_DRAWS", "200"))


# Lines write over the files that they are drawn with.
LINES_PER_FOLDER = 50


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path)


def load_compiled(folder: Path) -> None:
    """Compile all inner loops, and load here what a fork can take over: a child's seconds are then those of its command."""
    from counterflow.schedule.search import search

    search(2, 4, Costs(overlap=0.9), seconds=0.01)
    rebalance_experts(np.ones((1, 8)), 12, 2, 2, 4)
    np.save(folder / "counts.npy", np.random.default_rng(0).integers(0, 50, (6, 2, 8)))
    np.save(folder / "loads.npy", np.arange(16.0).reshape(2, 8))
    replay = f"balance replay {folder}/counts.npy --ranks 2 --nodes 2"
    plan = f"balance plan {folder}/loads.npy --slots 12 --ranks 2 --policy"
    for line in (replay, f"{plan} auto", f"{plan} global", f"{plan} deepseek"):
        assert (ended := run_line(main, line.split(), folder)).code == 0, ended


@pytest.mark.timeout(60 * 60)
def test_a_command_line_gives_a_result_or_one_line(tmp_path: Path) -> None:
    load_compiled(tmp_path)
    random, parser = Random(SEED), build_parser()
    faults, codes, slowest = [], [], 0.0
    for number in range(DRAWS):
        if number % LINES_PER_FOLDER == 0:
            folder = tmp_path / str(number)
            folder.mkdir()
            files = make_files(folder)
        argv = draw_line(random, parser, files)
        ended = run_line(main, argv, files.folder)
        codes.append(ended.code)
        slowest = max(slowest, ended.seconds)
        if fault := find_fault(argv, ended):
            faults.append(f"{[word[:60] for word in argv]}: {fault}")
            print(faults[-1], flush=True)
    assert not faults, f"{len(faults)} of {DRAWS} lines: " + "\n".join(faults[:20])
    assert slowest < LIMIT_SECONDS
    share = codes.count(0) / len(codes)
    assert DRAWS < 100 or 0.1 < share < 0.9, "draws that are all refused, or all good, try little"


def check_options(draw: Callable[[], Any], read: Callable[[Any], Any], draws: int) -> None:
    """Whatever is drawn gives options, or an `OptionError` of one line."""
    faults = []
    for _ in range(draws):
        given = draw()
        try:
            assert isinstance(merge_options(read(given)), Options)
        except OptionError as error:
            if "\n" in str(error) or not str(error).strip():
                faults.append(f"{given!r:.300}: {error}")
        except Exception as error:
            faults.append(f"{given!r:.300}: {type(error).__name__}: {error}")
    assert not faults, f"{len(faults)} of {draws}: " + "\n".join(faults[:20])


def test_a_mapping_gives_options_or_one_line() -> None:
    random = Random(SEED)
    check_options(lambda: draw_mapping(random, list(Options.model_fields)), read_values, 5 * DRAWS)


def test_flags_give_options_or_one_line(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files.folder)
    random, parser = Random(SEED), add_flags(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    check_options(lambda: draw_flags(random, parser, files), read_flags, 2 * DRAWS)
