"""The key "counterflow" of a DeepSpeed JSON: the options by their names, typos refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.deepspeed import seams
from counterflow.deepspeed.checks import explain
from counterflow.deepspeed.section import read_config, read_section
from counterflow.errors import OptionError
from counterflow.options import Options
from tests.support.running import run_python

FULL = {
    "schedule": "dualpipev",
    "zero_bubble": True,
    "overlap": False,
    "eplb": {"clones_per_rank": 2, "interval": 3},
    "record": "runs/record",
}


def test_names_are_those_of_the_options() -> None:
    chosen = read_section(FULL)
    assert chosen.options == Options(
        schedule="dualpipev", zero_bubble=True, overlap=False, eplb=True, eplb_clones_per_rank=2, eplb_interval=3,
        record=Path("runs/record"),
    )  # fmt: skip
    assert chosen.vpp is None


@pytest.mark.parametrize("value", [True, False])
def test_eplb_may_be_a_truth_value(value: bool) -> None:
    assert read_section({"eplb": value}).options.eplb is value


def test_vpp_gives_the_chunks_of_interleaved() -> None:
    assert read_section({"schedule": "interleaved", "vpp": 3}).vpp == 3


def test_other_sources_win() -> None:
    chosen = read_section({"schedule": "1f1b", "zero_bubble": True}, {"schedule": "zbv"})
    assert (chosen.options.schedule, chosen.options.zero_bubble) == ("zbv", True)


def test_a_config_is_a_dictionary_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "counterflow": FULL}))
    assert read_config(path) == read_config(str(path)) == read_config({"counterflow": FULL}) == FULL
    assert read_config({"train_batch_size": 8}) is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"schedul": "1f1b"}, "did you mean 'schedule'"),
        ({"eplb": {"clones_per_ranks": 1}}, "did you mean 'clones_per_rank'"),
        ({"eplb_interval": 1}, "allowed: schedule, overlap, costs, zero_bubble"),
        ({"platform": "cpu"}, "no key 'platform'"),
        ({"eplb": 1}, "true, false or an object"),
        ({"schedule": "dualpip"}, "schedule 'dualpip' is not known"),
        ({"schedule": "dualpipev", "vpp": 2}, "drop vpp"),
        ({"schedule": "interleaved", "vpp": 1}, "vpp 1 given"),
        ({"schedule": "interleaved", "vpp": True}, "vpp True given"),
        ({"eplb": {"interval": 0}}, "eplb.interval: "),
        ({"overlap": True}, "overlap overlaps the pairs of a schedule"),
    ],
)
def test_bad_sections_are_refused_in_one_line(section: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_section(section)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert "--cf-" not in message, "a JSON has no flags"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"counterfow": {}}, "did you mean 'counterflow'"),
        ({"counterflow": True}, "is an object of options"),
        ({"counterflow": None}, "is an object of options"),
        ("missing.json", "cannot be read"),
    ],
)
def test_bad_configs_are_refused(config: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_config(config)


@pytest.mark.slow
def test_seams_fit_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    code = "from counterflow.deepspeed import seams; seams.check_seams(seams.REMEDIES); print(len(seams.list_seams()))"
    assert int(run_python("-c", code).split()[-1]) == len(list(seams.SEAMS))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (FULL | {"eplb": False}, "cut into 2 stages a rank, laid out v"),
        ({"schedule": "interleaved", "vpp": 3}, "cut into 3 stages a rank, laid out looped"),
        ({"schedule": "1f1b"}, "are computed in the B"),
        ({"schedule": "dualpipev", "overlap": True}, "no expert_parallel is enabled"),
        ({}, "nothing"),
    ],
)
def test_doctor_says_what_a_config_asks_for(section: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"counterflow": section}))
    assert words in "\n".join(explain(str(path)))


def test_doctor_says_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"counterflow": {"schedule": "zbv"}, "zero_optimization": {"stage": 3}}))
    with pytest.raises(OptionError, match="zero_optimization.stage 3"):
        explain(str(path))
