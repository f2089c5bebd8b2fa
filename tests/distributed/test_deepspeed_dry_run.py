"""A dry run of a PipelineModule counts what autograd of the same model keeps that runs for real."""

import json
from pathlib import Path

import pytest

from tests.support.forked_ranks import run_ranks

GRIDS = [(1, 1), (2, 8), (4, 2048)]


def test_a_dry_run_of_a_pipeline_module_counts_what_a_real_one_keeps(tmp_path: Path) -> None:
    job = {"grids": GRIDS, "seeds": [1, 2]}
    (out,) = run_ranks("deepspeed_dry_worker", job, 1, tmp_path / "dry", trainer="deepspeed")
    found = json.loads(out.splitlines()[-1])
    parameters, kept = found["real 1"]
    assert found["real 2"] == [parameters, kept]
    ((whole_parameters, whole_kept),) = found["1 of 1"]
    assert whole_parameters == parameters
    assert whole_kept == pytest.approx(kept, rel=0.03)
    for stages, ranks in GRIDS[1:]:
        cut = found[f"{stages} of {ranks}"]
        assert len(cut) == stages
        # What is sent on is kept on both sides at most; the words are on the first and the last stage.
        assert sum(one for _, one in cut) == pytest.approx(kept, rel=0.03)
        assert parameters < sum(one for one, _ in cut) < 1.05 * parameters
    assert found["bf16"][0][1] == pytest.approx(kept / 2, rel=0.1)
    assert "reads the values of a tensor" in found["routed"] and "\n" not in found["routed"]
