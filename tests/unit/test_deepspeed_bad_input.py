"""What cannot work under DeepSpeed is refused in one line, and what DeepSpeed takes as a config is read."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.deepspeed import seams
from counterflow.deepspeed.checks import check_balancing, check_config, check_experts, check_run, explain
from counterflow.deepspeed.section import read_config
from counterflow.errors import OptionError, SeamError
from counterflow.options import merge_options
from counterflow.sections import read_section
from counterflow.trainer.seam import Seam
from counterflow.version import find_package

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
        ({"flops_profiler": {"enabled": True}}, "flops_profiler counts the steps of engines without pipeline"),
    ],
)
def test_configs_that_do_not_fit_a_schedule_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        check_config(read_section(SECTION), config)
    assert "\n" not in str(caught.value)


EXPERTS = {"expert_parallel": {"enabled": True, "autoep_size": 2}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "expert_parallel is not enabled"),
        ({"expert_parallel": {"enabled": False}}, "expert_parallel is not enabled"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage 3"),
        ({"expert_parallel": {"enabled": True, "comm_backend": "deepep"}}, "comm_backend deepep"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_configs_in_which_experts_cannot_be_balanced_are_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    section = {"eplb": {"rehome_interval": 1}}
    given = EXPERTS | config if config else {}
    check_balancing(read_section(section).options, EXPERTS)
    with pytest.raises(OptionError, match=words) as caught:
        check_balancing(read_section(section).options, given)
    assert "\n" not in str(caught.value)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given | {"counterflow": section}))
    with pytest.raises(OptionError, match=words):
        explain(str(path))


def test_doctor_explains_balancing(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(EXPERTS | {"counterflow": {"eplb": {"clones_per_rank": 3}}}))
    assert "clone slots on a rank in each of AutoEP's layers: 3" in "\n".join(explain(str(path)))


@pytest.mark.parametrize("eplb", [{"plan": "exact"}, {"buffers": "shared"}])
def test_slots_that_layers_share_need_gradients_that_stay_until_a_step_ends(eplb: dict[str, Any]) -> None:
    options = read_section({"eplb": eplb}).options
    check_balancing(options, EXPERTS | {"zero_optimization": {"stage": 1}})
    with pytest.raises(OptionError, match="adds gradients at homes in every micro-batch, and zero_optimization.stage 2"):
        check_balancing(options, EXPERTS | {"zero_optimization": {"stage": 2}})
    with pytest.raises(OptionError, match="runs in fp32 and bf16 in this version, and fp16 is enabled"):
        check_balancing(options, EXPERTS | {"fp16": {"enabled": True}})


def test_what_megatron_alone_measures_is_refused() -> None:
    with pytest.raises(OptionError, match="eplb.measure_forced measures under Megatron alone"):
        check_balancing(merge_options({"eplb": True, "eplb_measure_forced": 10}), EXPERTS)
    with pytest.raises(OptionError, match="measure_forced"):
        read_section({"eplb": {"measure_forced": 10}})


@pytest.mark.slow
def test_layers_that_pad_experts_to_a_capacity_are_refused() -> None:
    layer = pytest.importorskip("deepspeed.moe.layer")
    legacy = object.__new__(layer.MoE)
    with pytest.raises(OptionError, match="pad every expert to the same capacity.*balance cannot help"):
        check_experts(SimpleNamespace(modules=lambda: [legacy]))


def test_vpp_needs_a_schedule() -> None:
    with pytest.raises(OptionError, match="vpp 2 given, and no schedule: drop vpp"):
        read_section({"vpp": 2})


@pytest.mark.slow
def test_a_model_or_config_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe = pytest.importorskip("deepspeed.pipe")
    with pytest.raises(
        OptionError, match="needs a PipelineModule and the model is a SimpleNamespace: make one.*without a schedule, eplb"
    ):
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
        "_exec_gone" in message
        and f"deepspeed {find_package('deepspeed')}" in message
        and seams.REMEDIES[seams.SCHEDULE] in message
    )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"schedule": "zb-h1", "overlap": True}, "overlap runs overlapped pairs F&B and zb-h1 has none: choose interleaved"),
        ({"schedule": "interleaved", "vpp": 10**30}, "allowed: a whole number from 2 to 1000"),
    ],
)
def test_doctor_refuses_what_no_table_can_do(section: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"counterflow": section}))
    with pytest.raises(OptionError, match=words):
        explain(str(path))
