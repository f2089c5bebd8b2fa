"""When a rank dies, fails, is late or has another table, every other rank ends in time and says where it stood."""

import re
from pathlib import Path

import pytest

from stall_cases import CASES, RANKS
from tests.support.forked_ranks import fork_ranks


def run_ranks(case: str, logs: Path) -> tuple[list[int | None], list[str]]:
    """Return each rank's exit status and what it said."""
    statuses = fork_ranks("stall_worker", case, RANKS, logs, alone=True, timeout=120)
    texts = [(logs / str(rank) / "stderr.log").read_text() for rank in range(RANKS)]
    return statuses, [next((line for line in text.splitlines() if line.startswith("said: ")), text[-2000:]) for text in texts]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_says_where_it_stood(case: str, tmp_path: Path) -> None:
    how, at = CASES[case]
    statuses, said = run_ranks(case, tmp_path)
    # In the cool-down rank 3 needs nobody any more: it may be done.
    assert all(status != 0 for status in statuses[:3]), said
    assert None not in statuses, f"{case}: a rank waits for ever: {said}"
    survivors = [rank for rank in range(RANKS) if statuses[rank] != 0 and (how not in ("killed", "late") or rank != 2)]
    if how == "table":
        assert all("ranks 2 have another table than rank 0" in text for text in said), said
        return
    for rank in survivors:
        assert f"rank {rank} (global rank {rank})" in said[rank], f"rank {rank} does not say where it was: {said[rank]}"
        assert "position" in said[rank] and "actions before: " in said[rank]
    others = [said[rank] for rank in survivors if rank != 2]
    assert all(re.search(r"for member [01] of \d+[FB]\d+ of rank \d \(tag ", text) for text in others), f"for what? {others}"
    # Ranks 1 and 3 are beside it: what rank 2 was doing is to be found with one of them at least.
    blamed = [text for text in others if "; rank 2 (global rank 2)" in text]
    assert blamed, others
    # An I runs as a backward too, and the action may be part of a pair.
    stood = re.compile(rf"rank 2 \(global rank 2\) was in \S*{at.replace('B', '[BI]')}")
    if how in ("killed", "late"):
        seen = "is gone" if how == "killed" else "still runs"
        assert any(stood.search(text) and seen in text for text in blamed), blamed
    else:
        message = {"nan": "found NaN", "shape": "stage 5 gave (3, 2)", "dtype": "torch.float64"}[how]
        assert message in said[2]
        assert any(message in text for text in blamed), blamed
