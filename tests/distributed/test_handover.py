"""Pairs by hand-over between real ranks: one order of collectives whatever the pace, and words where one dies."""

import re
from pathlib import Path

from tests.support.forked_ranks import fork_ranks


def test_200_pairs_with_pauses_that_differ_between_the_ranks(tmp_path: Path) -> None:
    statuses = fork_ranks("handover_worker", "delays", 2, tmp_path, timeout=120)
    assert statuses == [0, 0], [(tmp_path / str(rank) / "stderr.log").read_text()[-2000:] for rank in range(2)]


def test_a_rank_killed_inside_a_pair_is_told_by_the_communication_that_the_others_stood_at(tmp_path: Path) -> None:
    statuses = fork_ranks("handover_worker", "killed", 2, tmp_path, alone=True, timeout=60)
    said = (tmp_path / "0" / "stderr.log").read_text()
    assert None not in statuses and statuses[0] != 0, said[-2000:]
    stood = (
        r"was in \(0F1;0B0\)OVERLAP_F_B \(step 0, position 1\) \[0F1 .* communication 2 \(dispatch 1\), 0B0 .* \(combine [01]\)\]"
    )
    assert re.search(r"said: rank 0 \(global rank 0\) " + stood, said), said[-2000:]
