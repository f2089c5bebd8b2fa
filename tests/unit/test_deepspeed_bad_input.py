"""What cannot work under DeepSpeed is refused in one line, and what DeepSpeed takes as a config is read."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.deepspeed import seams
from counterflow.deepspeed.checks import check_config, check_run
from counterflow.deepspeed.section import read_config, read_section
from counterflow.errors import OptionError, SeamError
from counterflow.trainer.seam import Seam

SECTION = {"schedule": "zbv"}
COMMENTED = """{
  // DeepSpeed reads HJSON: comments, and commas that are missing
  "train_batch_size": 8
  "counterflow": {"schedule": "zbv"}
}"""


def test_a_config_may_have_what_deepspeed_reads(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "config"
    path.write_text(COMMENTED)
    assert read_config(path) == SECTION
    assert read_config(base64.urlsafe_b64encode(COMMENTED.encode()).decode()) == SECTION


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(OptionError, match="config"):
        read_config(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage 2"),
        ({"zero_optimization": {"stage": 3}}, "give stage 0 or 1"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
    ],
)
def test_configs_that_do_not_fit_a_schedule_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        check_config(read_section(SECTION), config)
    assert "\n" not in str(caught.value)


def test_vpp_needs_a_schedule() -> None:
    with pytest.raises(OptionError, match="vpp 2 given, and no schedule: drop vpp"):
        read_section({"vpp": 2})


@pytest.mark.slow
def test_a_model_or_config_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe = pytest.importorskip("deepspeed.pipe")
    with pytest.raises(OptionError, match="needs a PipelineModule and the model is a SimpleNamespace: make one"):
        check_run(read_section(SECTION), {}, SimpleNamespace())
    model: Any = object.__new__(type("Model", (pipe.PipelineModule,), {"num_pipeline_stages": lambda self: self.ranks}))
    object.__setattr__(model, "ranks", 1)
    with pytest.raises(OptionError, match="num_stages is 1"):
        check_run(read_section(SECTION), {}, model)
    object.__setattr__(model, "ranks", 2)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with pytest.raises(OptionError, match="zero_optimization.stage 2"):
        check_run(read_section(SECTION), str(path), model)


@pytest.mark.slow
def test_a_version_with_other_symbols_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    gone = Seam(seams.PIPE_ENGINE, "_exec_gone", None, (seams.SCHEDULE,), seams.KNOWN, "called after the table")
    monkeypatch.setattr(seams, "SEAMS", (gone,))
    with pytest.raises(SeamError) as caught:
        seams.check_seams([seams.SCHEDULE])
    message = str(caught.value)
    assert (
        "_exec_gone" in message and f"deepspeed {seams.find_version()}" in message and seams.REMEDIES[seams.SCHEDULE] in message
    )
