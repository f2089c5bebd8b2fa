"""Routing that Megatron's RouterReplay has recorded is dealt to the same slots when it is replayed."""

import json
from pathlib import Path

import pytest

from tests.support.forked_ranks import run_ranks

pytestmark = pytest.mark.slow


def test_replayed_routing_has_the_same_slots(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core.transformer.moe.router_replay")
    results = tmp_path / "said.json"
    run_ranks("replay_worker", {"results": str(results)}, 2, tmp_path / "logs")
    said = json.loads(results.read_text())
    recorded, replayed = said["slots"]
    # Of each rank's six slots the last two are clones.
    assert all(recorded[slot] for slot in (4, 5, 10, 11)), "no token went to a clone: slots are as good as experts"
    assert recorded == replayed and said["replayed"] == 0
    assert said["chosen"] > 0, "the router chooses the same experts by itself: nothing is replayed"
