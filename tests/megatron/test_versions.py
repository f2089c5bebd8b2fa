"""The seams of other versions of Megatron, where a checkout of one is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUTS = ("MEGATRON_LM_0_17", "MEGATRON_LM_0_18", "MEGATRON_LM_PATH")


@pytest.mark.parametrize("variable", CHECKOUTS)
def test_seams_fit(variable: str) -> None:
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a Megatron-LM checkout")
    code = "from counterflow.megatron import seams; seams.check_seams(); print(seams.find_version())"
    env = {**os.environ, "PYTHONPATH": os.environ[variable]}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(os.environ[variable], "megatron", "core").is_dir()
