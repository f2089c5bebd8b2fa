"""Seams fit the installed Megatron, fail loudly where they do not, and change nothing before they are asked."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer

import counterflow
from counterflow.deepspeed import seams as deepspeed
from counterflow.errors import OptionError, SeamError
from counterflow.megatron import install, seams
from counterflow.megatron.seams import KNOWN, SEAMS, list_seams
from counterflow.megatron.v_layout.model import wrap_first
from counterflow.trainer.seam import Seam
from tests.support import ROOT
from tests.support.running import run_python

pytestmark = pytest.mark.slow

PATCH = ROOT / "patches" / "megatron-lm" / "0.17-0.20" / "enable.patch"


def make_seam(owner: str, symbol: str, *parameters: str) -> Seam:
    return Seam(owner, symbol, None, (seams.FLAGS,), KNOWN, "", parameters)


@pytest.mark.parametrize("seam", list_seams(), ids=lambda seam: seam.path)
def test_every_seam_fits_the_installed_megatron(seam: Seam) -> None:
    assert seam.find_misfit() is None


@pytest.mark.parametrize(
    ("seam", "said"),
    [
        (make_seam("megatron.training.training", "no_such"), "megatron.training.training.no_such does not exist"),
        (make_seam("megatron.training.training", "get_model", "other"), "takes (model_provider_func, model_type,"),
        (make_seam("megatron.no_such", "get_model"), "megatron.no_such.get_model cannot be imported"),
        (make_seam("megatron.core.distributed.NoSuch", "x"), "megatron.core.distributed.NoSuch.x cannot be imported"),
        (make_seam("megatron.core.distributed.DistributedDataParallel", "no_such"), "Parallel.no_such does not exist"),
    ],
)
def test_a_seam_that_does_not_fit_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch, seam: Seam, said: str) -> None:
    monkeypatch.setattr(seams, "SEAMS", (*SEAMS, seam))
    with pytest.raises(SeamError) as raised:
        seams.check_seams()
    assert said in str(raised.value)
    assert f"megatron-core {seams.find_version()}" in str(raised.value)


def dispatch(self: object, plan: object) -> None:
    """A dispatch of another shape: it wants what nobody gives."""


def test_another_dispatch_stops_overlapped_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoELayer, "dispatch", dispatch)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    counterflow.enable({"schedule": "dualpipev"}).undo()
    with pytest.raises(SeamError) as raised:
        counterflow.enable({"schedule": "dualpipev", "overlap": True})
    said = str(raised.value)
    assert "moe_layer.MoELayer.dispatch takes (self, plan) where (self, hidden_states, …) is expected" in said
    assert said.endswith("or drop --cf-overlap") and "\n" not in said


def test_the_first_argument_is_wrapped_by_position_and_by_name() -> None:
    def build(model: int, size: int = 1) -> tuple[int, int]:
        return model, size

    wrapped = wrap_first(build, lambda value: -value)
    assert wrapped(3) == wrapped(model=3) == (-3, 1)
    assert wrapped(3, size=2) == wrapped(size=2, model=3) == (-3, 2)


def test_yaml_cannot_choose_the_platform() -> None:
    parsed = SimpleNamespace(counterflow=SimpleNamespace(schedule="1f1b", record="runs"))
    assert install.read_yaml(parsed) == {"schedule": "1f1b", "record": Path("runs")}
    with pytest.raises(OptionError, match="give --cf-platform cpu on the command line"):
        install.read_yaml(SimpleNamespace(counterflow=SimpleNamespace(platform="cpu")))


@pytest.mark.parametrize(
    ("version", "is_due"), [("0.17.1", False), ("0.18.2", True), ("0.20.0rc1", True), ("0.16.0", False), ("0.21.0", True)]
)
def test_a_symbol_of_newer_versions_may_be_absent_from_older_ones(version: str, is_due: bool) -> None:
    (seam,) = [seam for seam in SEAMS if seam.symbol == "build_virtual_pipeline_stages"]
    assert seam.is_due(version, KNOWN) is is_due


STATE = """
import json, torch
from megatron.core.pipeline_parallel import schedules
from megatron.training import arguments, training
from megatron.core.tensor_parallel import random
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
def state():
    places = [torch.cuda, torch.distributed, schedules, arguments, training, random, DistributedOptimizer, torch.cuda.nvtx]
    return {f"{place}.{name}": id(value) for place in places for name, value in vars(place).items() if callable(value)}
"""


def test_importing_changes_nothing_and_undo_takes_all_back() -> None:
    code = f"""{STATE}
before = state()
import counterflow, counterflow.platform.cpu, counterflow.platform.megatron_cpu, counterflow.megatron.seams
imported = state() == before
patches = counterflow.enable({{"platform": "cpu"}})
enabled = state() != before and torch.zeros(1, device="cuda").device.type == "cpu"
patches.undo()
print(json.dumps([imported, enabled, state() == before, torch.cuda.is_available()]))
"""
    imported, enabled, undone, _ = json.loads(run_python("-c", code))
    assert imported, "importing patched something"
    assert enabled, "enabling did nothing"
    assert undone, "undo left something behind"


def test_doctor_says_that_all_fits() -> None:
    report = json.loads(run_python("-m", "counterflow.commands.main", "doctor", "--json"))
    assert report["fits"] is True
    known = [*SEAMS, *(deepspeed.SEAMS if report["packages"]["deepspeed"] else ())]
    assert [seam["symbol"] for seam in report["seams"]] == [seam.path for seam in known]
    assert not {feature for seam in known for feature in seam.features} ^ set(report["remedies"])
    text = run_python("-m", "counterflow.commands.main", "doctor")
    assert "every seam fits" in text
    assert report["packages"]["megatron-core"] in text


def test_the_flags_stand_in_the_scripts_help_under_one_heading(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from megatron.training.arguments import parse_args\nparse_args()\n")
    shown = run_python("-m", "counterflow.launch", script, "--help")
    heading = shown.index("\ncounterflow:")
    for flag in ("--cf-schedule", "--cf-platform", "--cf-record"):
        assert shown.index(f"  {flag}", heading) > heading
    assert "--num-layers" in shown


def test_the_patch_activates_a_vendored_megatron(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("megatron.training")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parents[1]
    shutil.copytree(installed, tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["patch", "-p1", "--no-backup-if-mismatch", "-i", str(PATCH)], cwd=tmp_path, check=True, capture_output=True)
    code = "import megatron.training as t; args = t.arguments.parse_args(); print(t.__file__, args.cf_platform)"
    said = run_python("-c", code, "--cf-platform", "auto", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert said.split() == [str(tmp_path / "megatron" / "training" / "__init__.py"), "auto"]


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["no_such_script.py"], 2, "counterflow: script 'no_such_script.py' does not exist"),
        (["SCRIPT", "--cf-schedule", "zigzag"], 2, "counterflow: --cf-schedule: schedule 'zigzag' is not known; allowed:"),
        (["SCRIPT", "--cf-fp8"], 2, "counterflow: --cf-fp8 is not a flag of this version"),
        (["SCRIPT", "--cf-schedule", "TABLE"], 2, "'hello' is not an action"),
        ([], 2, ""),
    ],
)
def test_launch_ends_on_bad_input_with_one_line(tmp_path: Path, argv: list[str], status: int, said: str) -> None:
    (tmp_path / "script.py").write_text("from megatron.training.arguments import parse_args\nparse_args()\n")
    (tmp_path / "table.csv").write_text("hello,world\n")
    names = {"SCRIPT": str(tmp_path / "script.py"), "TABLE": str(tmp_path / "table.csv")}
    more = ["--pipeline-model-parallel-size", "2", "--num-layers", "4"] if "TABLE" in argv else []
    command = [sys.executable, "-W", "ignore", "-m", "counterflow.launch", *(names.get(arg, arg) for arg in argv), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "WORLD_SIZE": "2"})
    assert done.returncode == status
    lines = [line for line in done.stderr.splitlines() if line.startswith("counterflow: ")]
    assert len(lines) == (1 if said else 0), done.stderr
    assert said in "".join(lines)
    assert "Traceback" not in done.stderr
