"""`make train TE=1 FP8=…`, from its command."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.training import SMALL

TRAIN = ROOT / "examples" / "pretrain_moe" / "train.py"


def run_example(*flags: str) -> tuple[int, str, str]:
    """Return status, output and errors of the example."""
    done = subprocess.run([sys.executable, str(TRAIN), *flags], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_example_trains_and_saves_in_fp8(tmp_path: Path) -> None:
    flags = ["--dir", str(tmp_path), "--te", "--fp8", "blockwise", "--eplb", "--ranks", "2", "--iters", "2", "--platform", "cpu"]
    flags += [*SMALL, "--global-batch-size", "4", "--eval-iters", "0", "--expert-model-parallel-size", "1"]
    code, said, errors = run_example(*flags)
    assert (code, errors) == (0, "")
    assert "step    2/2  loss" in said
    assert "over a stand-in for its kernels" in said.splitlines()[1]
    assert next(tmp_path.rglob("latest_checkpointed_iteration.txt")).read_text().strip() == "2"


def test_a_gpu_that_is_not_known_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COUNTERFLOW_CPU_CAPABILITY", "8.0")
    code, _, errors = run_example("--te", "--platform", "cpu", "--dir", str(tmp_path))
    assert (code, errors) == (1, "train: COUNTERFLOW_CPU_CAPABILITY=8.0 given, 9.0 (Hopper) or 10.0 (Blackwell) are allowed\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--te --fp8 fast", "FP8=fast given; delayed, tensorwise, blockwise, mxfp8 are allowed"),
        ("--fp8 blockwise", "FP8=blockwise needs Transformer Engine's layers: give TE=1 too"),
        ("--te --iters 0", "--iters 0 given; it must be at least 1"),
    ],
)
def test_options_of_the_example_that_cannot_be_end_in_one_line(flags: str, said: str) -> None:
    assert run_example(*flags.split()) == (1, "", f"train: {said}\n")
