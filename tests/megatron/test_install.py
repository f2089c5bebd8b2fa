"""Options are in force at once and once: what is asked for later and is not in force is an error, never silence."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.moe.moe_layer import MoELayer

import counterflow
from counterflow.errors import OptionError
from counterflow.megatron import install, seams
from counterflow.patching import Patches
from counterflow.trainer.seam import Seam
from tests.support.running import refuses


@pytest.fixture(autouse=True)
def no_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    before = schedules.get_forward_backward_func
    yield
    if counterflow._installation is not None:
        counterflow._installation.patches.undo()
    assert schedules.get_forward_backward_func is before, "undo left something behind"


def give_flags(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])


@pytest.mark.parametrize(
    ("first", "asked", "said"),
    [
        (None, {"schedule": "dualpipev"}, "--cf-schedule dualpipev is asked for and counterflow is on already with None"),
        ({"schedule": "1f1b"}, {"schedule": "zbv"}, "--cf-schedule zbv is asked for and counterflow is on already with 1f1b"),
        ({"schedule": "1f1b"}, {"schedule": None}, "--cf-schedule None is asked for and counterflow is on already with 1f1b"),
        ({"eplb": True}, {"eplb": True, "eplb_interval": 2}, "--cf-eplb-interval 2 is asked for"),
        ({"schedule": "1f1b"}, {"shedule": "1f1b"}, "counterflow has no option 'shedule'"),
    ],
)
def test_other_options_than_those_in_force_are_an_error(first: Any, asked: dict[str, Any], said: str) -> None:
    counterflow.enable(first)
    with refuses(said, OptionError):
        counterflow.enable(asked)


def test_the_same_options_again_change_nothing() -> None:
    patches = counterflow.enable({"schedule": "1f1b"})
    assert counterflow.enable({"schedule": "1f1b"}) is patches
    assert counterflow.enable() is patches


def test_after_undo_others_may_be_asked_for() -> None:
    counterflow.enable({"schedule": "1f1b"}).undo()
    counterflow.enable({"schedule": "zbv"})
    assert counterflow._installation is not None and counterflow._installation.options is not None
    assert counterflow._installation.options.schedule == "zbv"


def test_a_flag_wins_over_both_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    give_flags(monkeypatch, "--cf-schedule zbv --lr 1")
    patches = counterflow.enable({"schedule": "1f1b"})
    assert counterflow._installation is not None and counterflow._installation.options is not None
    assert counterflow._installation.options.schedule == "zbv"
    assert counterflow.enable({"schedule": "1f1b"}) is patches


def test_what_enable_is_given_is_in_force_at_once() -> None:
    before = schedules.get_forward_backward_func, MoELayer.__init__
    counterflow.enable({"schedule": "dualpipev", "eplb": True})
    assert schedules.get_forward_backward_func is not before[0], "no schedule until megatron.training parses its arguments"
    assert MoELayer.__init__ is not before[1], "no slots until megatron.training parses its arguments"


def test_without_options_only_the_flags_are_shown() -> None:
    before = schedules.get_forward_backward_func, MoELayer.__init__
    counterflow.enable()
    assert (schedules.get_forward_backward_func, MoELayer.__init__) == before


def test_groups_made_before_are_too_early_for_a_v(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    with pytest.raises(OptionError, match="call counterflow.enable\\(\\) before initialize_model_parallel"):
        counterflow.enable({"schedule": "dualpipev"})
    assert not torch.cuda.is_available() or torch.cuda.device_count(), "a refused enable() leaves nothing behind"


def test_megatrons_own_schedule_does_not_run_in_place_of_the_chosen_one() -> None:
    run = schedules.forward_backward_pipelining_without_interleaving
    counterflow.enable({"schedule": "1f1b"})
    with pytest.raises(OptionError, match="call get_forward_backward_func\\(\\) after counterflow.enable\\(\\), not before"):
        schedules.P2PCommunicator(None, None)
    assert "P2PCommunicator(" in __import__("inspect").getsource(run), "Megatron's schedule moves tensors by something else now"


@pytest.mark.parametrize("path", ["a file", "/proc/no/folder", "a file/below"])
def test_a_record_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path: Path, path: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(OptionError, match="--cf-record .* cannot be written: .*; give a folder that can be made and written"):
        counterflow.enable({"schedule": "1f1b", "record": tmp_path / path})


def make_parsed(**more: Any) -> SimpleNamespace:
    sizes = {"pipeline_model_parallel_size": 2, "num_layers": 4, "world_size": 2, "rank": 0}
    return SimpleNamespace(**{**sizes, "num_virtual_stages_per_pipeline_rank": None, **more})


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WORLD_SIZE", "2")

    def start(flags: str = "", given: dict[str, Any] | None = None) -> install.Installation:
        give_flags(monkeypatch, flags)
        counterflow.enable(given)
        assert counterflow._installation is not None
        return counterflow._installation

    return start


def test_yaml_lies_under_enable_and_flags(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    yaml = SimpleNamespace(schedule="1f1b", eplb=True, eplb_clones_per_rank=3, stall_limit=7)
    installed = start("--yaml-cfg f.yaml --cf-eplb-clones-per-rank 1 --cf-eplb-interval 4", {"schedule": "zbv"})
    assert installed.options is None, "the YAML file may add to them"
    parsed = make_parsed(counterflow=yaml, num_experts=4, world_size=4, expert_model_parallel_size=2)
    installed.take_arguments(parsed)
    assert (parsed.cf_schedule, parsed.cf_eplb, parsed.cf_eplb_clones_per_rank) == ("zbv", True, 1)
    assert (parsed.cf_eplb_interval, parsed.cf_stall_limit) == (4, 7.0)


def test_arguments_parsed_again_change_nothing(start: Any) -> None:
    installed = start("--cf-schedule dualpipev")
    function = schedules.get_forward_backward_func
    for _ in range(2):
        parsed = make_parsed()
        installed.take_arguments(parsed)
        assert parsed.cf_schedule == "dualpipev" and parsed.num_virtual_stages_per_pipeline_rank == 2
    assert schedules.get_forward_backward_func is function


@pytest.mark.parametrize("flags", ["--cf-schedule zbv", "", "--cf-schedule dualpipev --cf-stall-limit 5"])
def test_a_second_training_that_asks_for_others_is_an_error(start: Any, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    installed = start("--cf-schedule dualpipev")
    installed.take_arguments(make_parsed())
    give_flags(monkeypatch, flags)
    with pytest.raises(OptionError, match="is asked for and counterflow is on already with"):
        installed.take_arguments(make_parsed())


def test_a_loop_without_megatrons_trainer_needs_none_of_its_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams.importlib.util, "find_spec", lambda name: None)
    gone = Seam("megatron.training.no_such", "anything", "install.show_flags", (seams.FLAGS,), seams.KNOWN, "")
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, gone))
    seams.check_seams([seams.FLAGS])
    patches = Patches()
    install.take_seams(patches, [seams.FLAGS])
    assert not patches
