"""Used as a user does: the example from its command, a killed rank, Megatron-LM's own pretrain_gpt.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from counterflow.balance.files.recorded import read_record
from ranks import RankError, start_ranks
from tests.support import ROOT
from tests.support.training import SHARDED, SMALL, TWO_STAGES, list_base_flags
from train import TRACKER

TRAIN = ROOT / "examples" / "pretrain_moe" / "train.py"
BATCH = ["--global-batch-size", "8"]


def start_example(directory: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TRAIN), "--dir", str(directory), "--platform", "cpu", *SMALL, *BATCH, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def find_rank(driver: int, rank: int) -> int:
    """Return the process id of a rank that ``train.py`` (``driver``) has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == driver and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its ranks in /proc")
def test_a_killed_rank_ends_all_in_one_line_and_the_last_checkpoint_resumes(tmp_path: Path) -> None:
    # Two ranks: what they compute before the first step is to import Megatron.
    flags = "--ranks 2 --save-interval 2 --eval-interval 400".split()
    run = start_example(tmp_path, *flags, "--iters", "400")
    assert run.stdout is not None
    for line in run.stdout:
        if re.match(r"step +[3-9]/", line):
            break
    os.kill(find_rank(run.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = run.communicate(timeout=120)
    assert time.monotonic() - killed < 60, "the others hung"
    assert run.returncode == 1
    (said,) = [line for line in errors.splitlines() if line.strip()]
    match = re.search(r"train: rank 1 was killed \(SIGKILL\).*the checkpoint of step (\d+) is whole, run again to resume", said)
    assert match, said

    # What a save left half-written when it was interrupted is no checkpoint: only the tracker makes it one.
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "iter_0000399").mkdir()
    (checkpoints / "iter_0000399" / "__0_0.distcp").write_bytes(b"half")
    step = int(match[1])
    again = start_example(tmp_path, *flags, "--iters", str(step + 2))
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"resuming from the checkpoint of step {step}, on to step {step + 2}" in output
    assert re.search(rf"^step +{step + 1}/{step + 2} +loss ", output, re.MULTILINE), output
    assert (checkpoints / TRACKER).read_text() == str(step + 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ranks", "3"], "3 ranks do not fit TP x CP x PP = 1 x 1 x 2 = 2: start a multiple of 2 ranks"),
        (["--schedule", "zigzag"], "schedule 'zigzag' is not known; allowed: gpipe, 1f1b, interleaved, "),
        (["--ranks", "2", "--global-batch-size", "2"], "dualpipev: 2 micro-batches on 2 ranks given; it needs at least 4 "),
        (["--ranks", "2", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_what_cannot_work_ends_in_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    run = start_example(tmp_path, *flags)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert said in line
    assert not list(tmp_path.glob("checkpoints/iter_*"))


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="set MEGATRON_LM_PATH to a Megatron-LM core_v0.19.0 checkout")
def test_megatrons_own_pretrain_gpt_trains_under_dualpipev_with_clones(tmp_path: Path) -> None:
    script = Path(os.environ["MEGATRON_LM_PATH"]) / "pretrain_gpt.py"
    flags = [*list_base_flags(None, tmp_path), *SHARDED, *BATCH, *TWO_STAGES, *"--train-iters 4 --eval-interval 4".split()]
    flags += ["--cf-schedule", "dualpipev", "--cf-eplb", "--cf-record", str(tmp_path / "record")]
    lines: list[str] = []
    command = [sys.executable, "-W", "ignore", "-m", "counterflow.launch", str(script), *flags]
    start_ranks(4, command, tmp_path, lines.append)
    losses = [float(match[1]) for line in lines if (match := re.search(r"lm loss: ([\d.E+-]+)", line))]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert any("balancedness: " in line and " clones: " in line for line in lines)
    assert read_record(tmp_path / "record").steps.tolist() == [1, 2, 3, 4]


def test_a_rank_that_fails_is_named_with_its_exception(tmp_path: Path) -> None:
    code = "import os, time\nif os.environ['RANK'] == '1': raise KeyError('gone')\ntime.sleep(60)"
    with pytest.raises(RankError, match=r"rank 1 failed: KeyError: 'gone' \(exit status 1; log: .*stderr.log\)"):
        start_ranks(2, [sys.executable, "-c", code], tmp_path)
