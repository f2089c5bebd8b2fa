"""The executor over gloo, without Megatron: every family gives the gradients of the model in one piece."""

from pathlib import Path

import pytest

from tests.support.forked_ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_gives_the_gradients_of_one_piece(tmp_path: Path, ranks: int) -> None:
    said = run_ranks("runtime_worker", "tensors", ranks, tmp_path)
    assert all("ran 17 tables and 300 random ones" in text for text in said)
    assert all("refused what differs" in text for text in said), "a table that differs between ranks was not noticed"
