"""The key "counterflow" of a DeepSpeed JSON: the options by their names, typos refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.deepspeed import seams
from counterflow.deepspeed.checks import explain
from counterflow.deepspeed.section import read_config
from counterflow.errors import OptionError
from counterflow.options import Options
from counterflow.sections import describe_keys, read_section
from tests.support import ROOT
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


def test_a_path_of_balancing_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text('{"token_time": 4e-7}')
    chosen = read_section({"eplb": {"plan": "auto", "costs": str(tmp_path / "costs.json")}})
    assert chosen.options.eplb_costs == tmp_path / "costs.json"


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


def test_the_docs_have_the_table_of_keys() -> None:
    assert f"\n\n{describe_keys()}\n" in (ROOT / "docs" / "deepspeed.md").read_text(), "run: python scripts/write_options.py"


@pytest.mark.parametrize(("text", "words"), [('{"a": NaN}', "NaN is no number of a JSON"), ('{"a": 1e999}', "cannot be read")])
def test_a_file_with_numbers_that_are_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=words):
        read_config(path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"schedul": "1f1b"}, "did you mean schedule?"),
        ({"--cf-schedule": "1f1b"}, "has no key '--cf-schedule'; allowed: schedule, overlap, "),
        ({"--cf-schedule": "1f1b"}, "did you mean schedule?"),
        ({"zero-bubble": True}, "did you mean zero_bubble?"),
        ({"eplb": {"clones_per_ranks": 1}}, "did you mean clones_per_rank?"),
        (
            {"eplb_interval": 1},
            "allowed: schedule, overlap, costs, zero_bubble, stall_limit, record, profile, eplb, vpp; it stands in",
        ),
        ({"eplb_clones_per_rank": 1}, 'it stands in "eplb": {"clones_per_rank": …}'),
        ({"platform": "cpu"}, "no key 'platform'"),
        ({"eplb": 1}, "true, false or an object"),
        ({"schedule": "dualpip"}, "schedule 'dualpip' is not known"),
        ({"schedule": "dualpipv"}, "did you mean dualpipev?"),
        ({"schedule": 3}, "schedule: a text is expected (given: 3)"),
        ({"eplb": {"policy": "gobal"}}, "eplb.policy: allowed: auto, global; did you mean global? (given: 'gobal')"),
        ({"overlap": "yes"}, "overlap: true or false is expected (given: 'yes')"),
        ({"overlap": 1}, "overlap: true or false is expected (given: 1)"),
        ({"record": ""}, "record: a path is expected (given: '')"),
        ({"record": 5}, "record: a path is expected (given: 5)"),
        ({"record": "x"}, "the steps of a schedule or the loads of eplb and none is given"),
        ({"eplb": {"clones_per_rank": "2"}}, "eplb.clones_per_rank: a whole number is expected (given: '2')"),
        ({"eplb": {"interval": float("nan")}}, "eplb.interval: a whole number is expected (given: nan)"),
        ({"schedule": "1f1b", "stall_limit": "5"}, "stall_limit: a number is expected (given: '5')"),
        ({"stall_limit": float("inf")}, "stall_limit: a number that is finite is expected"),
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
    assert "--cf-" not in message.replace("'--cf-schedule'", ""), "a JSON has no flags"


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
