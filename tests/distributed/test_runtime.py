"""The executor over gloo, without Megatron: every family gives the gradients of the model in one piece."""

from pathlib import Path

import pytest

from tests.support.forked_ranks import fork_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_gives_the_gradients_of_one_piece(tmp_path: Path, ranks: int) -> None:
    statuses = fork_ranks("runtime_worker", None, ranks, tmp_path)
    assert statuses == [0] * ranks, [(tmp_path / str(rank) / "stderr.log").read_text()[-2000:] for rank in range(ranks)]
    said = [(tmp_path / str(rank) / "stdout.log").read_text() for rank in range(ranks)]
    assert all("ran 16 tables" in text and "ran 300 random tables" in text for text in said)
    assert all("refused another table" in text for text in said), "a table that differs between ranks was not noticed"
