"""The executor over gloo, without Megatron: every family gives the gradients of the model in one piece."""

import sys
from pathlib import Path

import pytest

from ranks import start_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_gives_the_gradients_of_one_piece(tmp_path: Path, ranks: int) -> None:
    worker = str(Path(__file__).with_name("runtime_worker.py"))
    logs = start_ranks(ranks, [sys.executable, worker], tmp_path)
    said = [(logs / str(rank) / "stdout.log").read_text() for rank in range(ranks)]
    assert all("ran 16 tables" in text and "ran 300 random tables" in text for text in said)
    assert all("refused another table" in text for text in said), "a table that differs between ranks was not noticed"
