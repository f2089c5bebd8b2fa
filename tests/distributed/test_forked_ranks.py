"""A rank that dies in compiled code is tried again once, with a warning; one that dies again fails its test."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.forked_ranks import RanksError, run_ranks


def run(tries: str) -> None:
    """Be a rank: die of a segmentation fault while ``tries`` has a letter left."""
    left = Path(tries)
    if os.environ["RANK"] == "1" and (text := left.read_text()):
        left.write_text(text[1:])
        os.kill(os.getpid(), signal.SIGSEGV)
    print("well")


def test_a_rank_that_dies_once_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "tries").write_text("x")
    with pytest.warns(UserWarning, match=r"rank 1 of \[.*-11.*\] ended badly; it wrote last: Fatal Python error: Segmentation"):
        said = run_ranks("test_forked_ranks", str(tmp_path / "tries"), 2, tmp_path / "logs" / "case")
    assert said == ["well\n"] * 2


def test_a_rank_that_dies_twice_fails(tmp_path: Path) -> None:
    (tmp_path / "tries").write_text("xx")
    with pytest.warns(UserWarning), pytest.raises(RanksError, match="rank 1 of"):
        run_ranks("test_forked_ranks", str(tmp_path / "tries"), 2, tmp_path / "logs" / "case")
