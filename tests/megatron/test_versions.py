"""Other versions of Megatron, where a checkout of one is at hand: the seams fit, the patch applies."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.running import run_python

PATCH = ROOT / "patches" / "megatron-lm" / "0.17-0.20" / "enable.patch"
CHECKOUTS = ("MEGATRON_LM_0_17", "MEGATRON_LM_0_18", "MEGATRON_LM_0_20", "MEGATRON_LM_PATH")
CHECK = """
from counterflow.megatron import install, seams
from counterflow.patching import Patches
seams.check_seams()
install.take_seams(Patches(), [seams.OVERLAP])
"""


def find_checkout(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a Megatron-LM checkout")
    return Path(os.environ[variable])


@pytest.mark.parametrize("variable", CHECKOUTS)
def test_seams_fit(variable: str) -> None:
    tree = find_checkout(variable)
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = f"{CHECK}\nimport megatron.core; print(megatron.core.__file__)"
    said = run_python("-c", code, env={**os.environ, "PYTHONPATH": path})
    assert Path(said.splitlines()[-1]).is_relative_to(tree), "another Megatron was looked at"


@pytest.mark.parametrize("variable", CHECKOUTS)
def test_the_patch_applies(variable: str) -> None:
    tree = find_checkout(variable)
    done = subprocess.run(["patch", "-p1", "--dry-run", "-i", str(PATCH)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
