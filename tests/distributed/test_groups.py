"""Process groups that only their ranks open."""

from pathlib import Path

from tests.support.forked_ranks import run_ranks


def test_ranks_that_are_in_other_groups_before_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    """As the first stage of a pipeline, which Megatron puts into a group of its own."""
    run_ranks("groups_worker", None, 2, tmp_path)
