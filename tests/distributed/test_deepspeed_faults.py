"""DeepSpeed under a schedule when a rank is killed, and its example as a user starts it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_deepspeed import SEEDS, STEPS, make_case, run_cases
from tests.support import ROOT
from tests.support.comparing import assert_same_steps
from tests.support.forked_ranks import fork_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
TRAIN = ROOT / "examples" / "pretrain_deepspeed" / "train.py"


def test_a_killed_rank_ends_the_others_with_a_report_and_the_last_checkpoint_loads(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    section = {"schedule": "dualpipev", "stall_limit": 5}
    killed = make_case("dense", None, SEEDS[0], counterflow=section) | {
        "save": saved,
        "save_at": STEPS // 2,
        "kill": [1, STEPS - 2],
    }
    (tmp_path / "cases.json").write_text(json.dumps({"killed": killed}))
    argument = [str(tmp_path / "cases.json"), str(tmp_path / "out.json")]
    statuses = fork_ranks("deepspeed_worker", argument, 4, tmp_path / "logs", alone=True, timeout=120, trainer="deepspeed")
    assert statuses[1] == -9
    # Rank 1 is of the second replica: its pipeline peer is rank 3.
    assert None not in statuses and statuses[3] != 0, "a rank hung"
    written = (tmp_path / "logs" / "3" / "stderr.log").read_text()
    # A rank says where it is once a second; these steps are shorter.
    named = r"rank 1 \(global rank 3\) waited .* of 0F\d of rank 0 .* actions before: .*; rank 0 .*(is gone|never said anything)"
    assert re.search(named, written), written[-2000:]

    again = make_case("dense", "dualpipev", SEEDS[1]) | {"load": {"load_dir": saved}}
    (tmp_path / "resumed").mkdir()
    runs = run_cases({"whole": make_case("dense", None, SEEDS[0]), "again": again}, tmp_path / "resumed")
    assert runs["again"]["steps"][0]["iteration"] == STEPS // 2 + 1
    assert_same_steps(runs["again"], runs["whole"])


@pytest.mark.nightly
def test_a_killed_partner_is_named(tmp_path: Path) -> None:
    case = make_case("dense", None, SEEDS[0], counterflow={"schedule": "dualpipe", "stall_limit": 5}) | {"kill": [1, 2]}
    (tmp_path / "cases.json").write_text(json.dumps({"killed": case}))
    argument = [str(tmp_path / "cases.json"), str(tmp_path / "out.json")]
    statuses = fork_ranks("deepspeed_worker", argument, 4, tmp_path / "logs", alone=True, timeout=120, trainer="deepspeed")
    assert None not in statuses and all(statuses), "a rank hung"
    written = (tmp_path / "logs" / "0" / "stderr.log").read_text()
    assert "global rank 0 waited for its partner, global rank 1: " in written, written[-2000:]


def train(folder: Path, *options: str) -> str:
    command = [sys.executable, str(TRAIN), "--dir", str(folder), "--platform", "cpu", "--ranks", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_learns_and_resumes(tmp_path: Path) -> None:
    first = train(tmp_path, "--iters", "4")
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", first)]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1
    second = train(tmp_path, "--iters", "5")
    assert "resuming from the checkpoint of step 4, on to step 5" in second
    again = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", second)]
    assert again[0] == losses[-1], "what was saved is not what was loaded"
