"""A script over Hugging Face's Accelerate, whose DeepSpeed config has the plugin's key."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_deepspeed_experts import clone, make_case
from tests.support.forked_ranks import run_ranks

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

STEPS = 4


def test_accelerate_passes_the_key_on(tmp_path: Path) -> None:
    losses = {}
    for name, key in (("plain", None), ("clones", clone() | {"record": str(tmp_path / "record")})):
        config, out = tmp_path / f"{name}.json", tmp_path / f"{name}-losses.json"
        config.write_text(json.dumps(make_case(key)["config"]))
        run_ranks("accelerate_worker", [str(config), str(out), str(STEPS)], 4, tmp_path / "logs" / name, trainer="deepspeed")
        losses[name] = json.loads(out.read_text())
    assert losses["clones"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["plain"][-1] < losses["plain"][0] - 0.1
    (path,) = (tmp_path / "record").glob("eplb-*.jsonl")
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert [step["microbatches"] for step in steps] == [2] * STEPS
    assert steps[-1]["clones"] > 0
