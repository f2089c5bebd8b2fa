"""Flags and options: what is allowed is read, all else is refused in one line."""

import argparse
from pathlib import Path

import pytest

from counterflow.config import SCHEDULES, Options, add_flags, merge_options, read_flags, read_mapping
from counterflow.errors import OptionError


def test_flags_among_a_scripts_own_are_read() -> None:
    options = read_flags(["--lr", "1e-3", "--cf-schedule", "dualpipev", "--cf-record=runs/x", "--cf-platform", "cpu", "file"])
    assert options == Options(schedule="dualpipev", platform="cpu", record=Path("runs/x"))


def test_a_flag_can_be_taken_back() -> None:
    assert read_flags(["--cf-zero-bubble"]).zero_bubble is True
    assert read_flags(["--no-cf-zero-bubble"]).zero_bubble is False
    assert read_flags([]).zero_bubble is None, "where nothing is said, the model decides"


def test_without_flags_nothing_is_asked_for() -> None:
    assert read_flags(["--lr", "1e-3"]) == Options()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--cf-schedule", "zigzag"],
            f"schedule 'zigzag' is not known; allowed: {', '.join(SCHEDULES)} or a table FILE.csv",
        ),
        (["--no-cf-overlay"], "--no-cf-overlay is not a flag of this version of counterflow; allowed: "),
        (["--cf-stall-limit", "0"], "--cf-stall-limit: Input should be greater than 0 (given: 0.0)"),
        (["--cf-stall-limit", "soon"], "invalid float value: 'soon'"),
        (["--cf-schedule", "none.csv"], "schedule file 'none.csv' does not exist"),
        (
            ["--cf-eplib"],
            "--cf-eplib is not a flag of this version of counterflow; allowed: --cf-schedule, --cf-overlap, --cf-platform, ",
        ),
        (["--cf-shedule", "1f1b"], "did you mean --cf-schedule?"),
        (["--cf-zero-bubble=1"], "ignored explicit argument '1'"),
        (["--cf-platform", "tpu"], "invalid choice: 'tpu'"),
        (["--cf-schedule"], "expected one argument"),
        (["--cf-eplb-interval", "2"], "--cf-eplb-interval is for --cf-eplb, which is not given: add it"),
        (["--cf-eplb-split", "even"], "--cf-eplb-split is for --cf-eplb, which is not given: add it"),
        (
            ["--cf-eplb", "--cf-eplb-clones-per-rank", "0"],
            "--cf-eplb-clones-per-rank 0 leaves nothing to balance with: give 1 or more, or --cf-eplb-rehome-interval",
        ),
        (["--cf-eplb", "--cf-eplb-clones-per-rank=-1"], "--cf-eplb-clones-per-rank: Input should be greater than or equal to 0"),
        (["--cf-eplb", "--cf-eplb-interval", "0"], "--cf-eplb-interval: Input should be greater than or equal to 1 (given: 0)"),
        (["--cf-eplb", "--cf-eplb-rehome-interval", "0"], "--cf-eplb-rehome-interval: Input should be greater than or equal"),
        (["--cf-eplb", "--cf-eplb-policy", "local"], "--cf-eplb-policy: invalid choice: 'local'"),
        (["--cf-eplb", "--cf-eplb-split", "half"], "--cf-eplb-split: invalid choice: 'half'"),
        (["--cf-eplb", "--cf-eplb-clones", "1"], "did you mean --cf-eplb-clones-per-rank?"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(OptionError) as raised:
        read_flags(argv)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_balancing_is_read_with_what_belongs_to_it() -> None:
    assert read_flags(["--cf-eplb"]) == Options(eplb=True)
    argv = "--cf-eplb --cf-eplb-clones-per-rank 2 --cf-eplb-interval 5 --cf-eplb-policy global --cf-eplb-split even".split()
    expected = Options(eplb=True, eplb_clones_per_rank=2, eplb_interval=5, eplb_policy="global", eplb_split="even")
    assert read_flags(argv) == expected
    alone = read_flags("--cf-eplb --cf-eplb-clones-per-rank 0 --cf-eplb-rehome-interval 50".split())
    assert (alone.eplb_clones_per_rank, alone.eplb_rehome_interval) == (0, 50)


def test_a_mapping_is_as_strict() -> None:
    assert read_mapping({"schedule": "1f1b"}).schedule == "1f1b"
    with pytest.raises(OptionError, match="counterflow has no option 'shedule'; allowed: schedule, "):
        read_mapping({"shedule": "1f1b"})
    with pytest.raises(OptionError, match="--cf-platform"):
        read_mapping({"platform": "tpu"})


def test_flags_win_over_a_mapping() -> None:
    mapping = read_mapping({"schedule": "1f1b", "platform": "cpu"})
    assert merge_options(mapping, read_flags(["--cf-schedule", "dualpipev"])) == Options(schedule="dualpipev", platform="cpu")
    assert merge_options(mapping, read_flags([])) == mapping


def test_every_option_has_a_flag_with_help_under_one_heading() -> None:
    parser = add_flags(argparse.ArgumentParser())
    text = parser.format_help()
    assert text.count("counterflow:") == 1
    for name in Options.model_fields:
        assert f"--cf-{name.replace('_', '-')}" in text
