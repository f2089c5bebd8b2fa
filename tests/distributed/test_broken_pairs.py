"""Trainings whose rank 1 breaks down inside an overlapped pair: one true trace there, the others end and say where they stood."""

import re
from pathlib import Path

import pytest

from tests.support.forked_ranks import fork_ranks
from tests.support.training import TWO_STAGES, list_base_flags

RANKS, BROKEN = 4, 1


def break_in_pair(how: str, part: str, text: Path, directory: Path) -> tuple[list[int | None], list[str]]:
    """Train until rank 1 breaks down in its F or B; return each rank's exit status and what it wrote to stderr."""
    flags = [*list_base_flags(text, directory), *TWO_STAGES, "--train-iters", "2", "--moe-layer-freq", "1"]
    flags += ["--cf-schedule", "dualpipev", "--cf-overlap", "--cf-stall-limit", "20"]
    case = {"name": how, "plugin": True, "flags": flags, "breaks": (how, part)}
    argument = {"case": case, "results": str(directory / "results.json")}
    statuses = fork_ranks("breaking_worker", argument, RANKS, directory, alone=True, timeout=60)
    return statuses, [(directory / str(rank) / "stderr.log").read_text() for rank in range(RANKS)]


@pytest.mark.parametrize(("how", "part"), [("error", "F"), ("error", "B"), ("interrupt", "B")])
def test_an_error_in_one_part_of_a_pair_ends_all_with_one_trace(how: str, part: str, text: Path, tmp_path: Path) -> None:
    statuses, said = break_in_pair(how, part, text, tmp_path)
    assert None not in statuses and all(statuses), f"{statuses}\n{said[BROKEN][-3000:]}"
    trace = said[BROKEN]
    assert "in break_down" in trace, trace[-3000:]
    assert ("the router broke" if how == "error" else "KeyboardInterrupt") in trace.rstrip().splitlines()[-1]
    assert "During handling" not in trace and "Ended" not in trace, trace[-3000:]


def test_a_rank_killed_in_a_pair_is_told_by_the_communication_that_its_peer_stood_at(text: Path, tmp_path: Path) -> None:
    statuses, said = break_in_pair("killed", "B", text, tmp_path)
    assert None not in statuses and all(statuses), f"{statuses}\n{said[0][-3000:]}"
    pair = r"rank 0 \(global rank 0\) was in \(\d+F\d+;\d+B\d+\)OVERLAP_F_B"
    stood = rf"{pair} .*\[.*communication \d+ \((dispatch|combine) of layer \d+\)"
    assert re.search(stood, said[0]), said[0][-3000:]
