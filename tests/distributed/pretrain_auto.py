"""The example's training script under ``--cf-schedule auto``, made to find a table and to reach the step that uses it.

What a tiny model's stages cost is noise: the table is searched for costs by which there is a better one than ZB-V.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "pretrain_moe"))

import pretrain_moe as example
from counterflow.schedule import Costs, search_process
from counterflow.schedule.search_process import SearchProcess
from counterflow.trainer import auto

measure = auto.estimate_costs


def estimate_costs(*args: Any, **kwargs: Any) -> Costs:
    measured = measure(*args, **kwargs)
    assert all(cost > 0 for costs in (measured.f, measured.i, measured.w) for cost in costs)
    return Costs(1.0, 1.5, 0.5)


def is_done(search: SearchProcess) -> bool:
    """Take two steps beside the search, then wait for it."""
    asked[search] = asked.get(search, 0) + 1
    if asked[search] > 2:
        search._process.wait()
    return search._process.poll() is not None


asked: dict[SearchProcess, int] = {}

if __name__ == "__main__":
    with (
        mock.patch.object(auto, "SEARCH_SECONDS", 1.0),
        mock.patch.object(search_process, "LOWEST_PRIORITY", 0),
        mock.patch.object(auto, "estimate_costs", estimate_costs),
        mock.patch.object(SearchProcess, "is_done", is_done),
    ):
        example.main()
