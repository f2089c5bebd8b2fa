"""Flags and options: what is allowed is read, all else is refused in one line."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from counterflow.errors import OptionError
from counterflow.options import (
    SCHEDULES,
    Options,
    add_flags,
    describe_options,
    merge_options,
    read_flags,
    read_mapping,
    read_values,
)
from tests.support.running import refuses


def test_flags_among_a_scripts_own_are_read() -> None:
    given = read_flags(["--lr", "1e-3", "--cf-schedule", "dualpipev", "--cf-record=runs/x", "--cf-platform", "cpu", "file"])
    assert given == {"schedule": "dualpipev", "platform": "cpu", "record": Path("runs/x")}


def test_every_switch_can_be_taken_back() -> None:
    assert read_flags(["--cf-zero-bubble"]) == {"zero_bubble": True}
    assert read_flags(["--no-cf-zero-bubble", "--no-cf-eplb", "--no-cf-overlap"]) == {
        "zero_bubble": False,
        "eplb": False,
        "overlap": False,
    }


def test_without_flags_nothing_is_asked_for() -> None:
    assert read_flags(["--lr", "1e-3"]) == {}
    assert merge_options(read_flags([])) == Options()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cf-schedule", "zigzag"], f"schedule 'zigzag' is not known; allowed: {', '.join(SCHEDULES)} or a table FILE.csv"),
        (["--no-cf-overlay"], "--no-cf-overlay is not a flag of this version of counterflow; allowed: "),
        (["--cf-profile", "0"], "--cf-profile: steps 0; allowed: STEP or FIRST:LAST"),
        (["--cf-profile", "7:3"], "steps 7:3"),
        (["--cf-profile", "1:101"], "100 steps at most"),
        (["--cf-profile", "3"], "--cf-profile (3 given) is for the steps of a --cf-schedule and none is given"),
        (["--cf-stall-limit", "0"], "--cf-stall-limit: Input should be greater than 0 (given: '0')"),
        (["--cf-stall-limit", "soon"], "--cf-stall-limit: Input should be a valid number"),
        (["--cf-eplb-interval", "1e300"], "--cf-eplb-interval: Input should be a valid integer"),
        (["--cf-eplb-interval", "9" * 30], "--cf-eplb-interval: Input should be less than or equal to 1000000"),
        (["--cf-schedule", "x" * 5000 + ".csv"], "… cannot be read: File name too long"),
        (["--cf-schedule", "none.csv"], "schedule file 'none.csv' does not exist"),
        (
            ["--cf-eplib"],
            "--cf-eplib is not a flag of this version of counterflow; allowed: --cf-schedule, --cf-overlap, --no-cf-overlap, ",
        ),
        (["--cf-shedule", "1f1b"], "did you mean --cf-schedule?"),
        (["--cf-zero-bubble=1"], "ignored explicit argument '1'"),
        (["--cf-platform", "tpu"], "--cf-platform: allowed: auto, cpu, cuda"),
        (["--cf-schedule"], "expected one argument"),
        (["--cf-schedule", "dualpipv"], "did you mean dualpipev?"),
        (["--cf-eplb-policy", "gobal"], "--cf-eplb-policy: allowed: auto, global; did you mean global? (given: 'gobal')"),
        (["--cf-record", ""], "--cf-record: a path is expected (given: '')"),
        (["--cf-eplb-interval", "2"], "--cf-eplb-interval is for --cf-eplb, which is not given: add it"),
        (["--cf-eplb-split", "even"], "--cf-eplb-split is for --cf-eplb, which is not given: add it"),
        (
            ["--cf-eplb", "--cf-eplb-clones-per-rank", "0", "--cf-eplb-rehome-interval", "never"],
            "--cf-eplb-clones-per-rank 0 leaves nothing to balance with under --cf-eplb-rehome-interval never: give 1 clone or",
        ),
        (["--cf-eplb", "--cf-eplb-clones-per-rank=-1"], "--cf-eplb-clones-per-rank: Input should be greater than or equal to 0"),
        (["--cf-eplb", "--cf-eplb-interval", "0"], "--cf-eplb-interval: Input should be greater than or equal to 1 (given: '0')"),
        (["--cf-eplb", "--cf-eplb-measure-forced", "-1"], "--cf-eplb-measure-forced: Input should be greater than or equal to 0"),
        (["--cf-eplb-measure-forced", "5"], "--cf-eplb-measure-forced is for --cf-eplb, which is not given: add it"),
        (["--cf-eplb", "--cf-eplb-rehome-interval", "0"], "allowed: auto, never, or steps from 1 to 1,000,000 (given: '0')"),
        (["--cf-eplb", "--cf-eplb-rehome-interval", "1000001"], "--cf-eplb-rehome-interval: allowed: auto, never, or steps from"),
        (["--cf-eplb", "--cf-eplb-rehome-interval", "soon"], "--cf-eplb-rehome-interval: allowed: auto, never, or steps from 1"),
        (
            ["--cf-eplb", "--cf-eplb-policy", "local"],
            "--cf-eplb-policy: allowed: auto, global; did you mean global? (given: 'local')",
        ),
        (["--cf-eplb", "--cf-eplb-split", "half"], "--cf-eplb-split: allowed: exact, even (given: 'half')"),
        (["--cf-eplb", "--cf-eplb-plan", "best"], "--cf-eplb-plan: allowed: predicted, exact, auto (given: 'best')"),
        (["--cf-eplb-plan", "exact"], "--cf-eplb-plan is for --cf-eplb, which is not given: add it"),
        (
            ["--cf-eplb", "--cf-eplb-plan", "auto", "--cf-eplb-split", "even"],
            "--cf-eplb-plan auto needs the counts that --cf-eplb-split even does without: give --cf-eplb-split exact",
        ),
        (
            ["--cf-eplb", "--cf-eplb-buffers", "shared", "--cf-eplb-split", "even"],
            "--cf-eplb-buffers shared needs the counts that --cf-eplb-split even does without: give --cf-eplb-split exact",
        ),
        (
            "--cf-eplb --cf-eplb-plan exact --cf-eplb-clones-per-rank 0 --cf-eplb-rehome-interval 5".split(),
            "--cf-eplb-plan exact has no slots with --cf-eplb-clones-per-rank 0: give 1 or more",
        ),
        (["--cf-eplb", "--cf-eplb-plan", "exact", "--cf-eplb-buffers", "per-layer"], "--cf-eplb-buffers per-layer is given"),
        (["--cf-eplb", "--cf-eplb-backward", "again"], "--cf-eplb-backward: allowed: resend, keep (given: 'again')"),
        (
            ["--cf-eplb", "--cf-eplb-backward", "keep"],
            "--cf-eplb-backward keep is for clones in shared slots, and --cf-eplb-plan predicted with --cf-eplb-buffers "
            "per-layer has none: drop it, or give --cf-eplb-plan exact or auto",
        ),
        (
            ["--cf-eplb", "--cf-eplb-costs", "c.json"],
            "--cf-eplb-costs c.json is for --cf-eplb-plan auto and predicted is in force",
        ),
        (["--cf-overlap"], "--cf-overlap overlaps the pairs of a --cf-schedule and none is given: add --cf-schedule interleaved"),
        (
            ["--cf-record", "x"],
            "--cf-record (x given) is for the steps of a --cf-schedule or the loads of --cf-eplb and none is given",
        ),
        (["--no-cf-zero-bubble"], "--cf-zero-bubble (False given) is for the steps of a --cf-schedule and none is given"),
        (["--cf-stall-limit", "5"], "--cf-stall-limit (5.0 given) is for the steps of a --cf-schedule and none is given"),
        (["--cf-eplb", "--cf-eplb-clones", "1"], "did you mean --cf-eplb-clones-per-rank?"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(argv: list[str], said: str) -> None:
    with refuses(said, OptionError):
        merge_options(read_flags(argv))


def test_balancing_is_read_with_what_belongs_to_it() -> None:
    assert merge_options(read_flags(["--cf-eplb"])) == Options(eplb=True)
    argv = "--cf-eplb --cf-eplb-clones-per-rank 2 --cf-eplb-interval 5 --cf-eplb-policy global --cf-eplb-split even".split()
    expected = Options(eplb=True, eplb_clones_per_rank=2, eplb_interval=5, eplb_policy="global", eplb_split="even")
    assert merge_options(read_flags(argv)) == expected
    alone = merge_options(read_flags("--cf-eplb --cf-eplb-clones-per-rank 0 --cf-eplb-rehome-interval 50".split()))
    assert (alone.eplb_clones_per_rank, alone.eplb_rehome_interval) == (0, 50)


@pytest.mark.parametrize(
    ("flags", "moves", "needs"),
    [
        ("", True, False),
        ("--cf-eplb-rehome-interval never", False, False),
        ("--cf-eplb-rehome-interval auto", True, True),
        ("--cf-eplb-rehome-interval 3", True, True),
        ("--cf-eplb-clones-per-rank 0", True, True),
    ],
)
def test_homes_may_move_unless_told_not_to_and_have_to_where_that_is_asked(flags: str, moves: bool, needs: bool) -> None:
    options = merge_options(read_flags(["--cf-eplb", *flags.split()]))
    assert (options.moves_homes, options.needs_moves) == (moves, needs)
    assert not options.keep_homes().moves_homes and not options.keep_homes().needs_moves


def test_a_mapping_is_as_strict() -> None:
    assert read_mapping({"schedule": "1f1b"}).schedule == "1f1b"
    with pytest.raises(OptionError, match="counterflow has no option 'shedule'; allowed: schedule, "):
        read_mapping({"shedule": "1f1b"})
    with pytest.raises(OptionError, match="--cf-platform"):
        read_mapping({"platform": "tpu"})
    # A number in quotes is none, and a switch is no number: YAML and a mapping say which they mean.
    for given in ({"overlap": 1}, {"overlap": "yes"}, {"eplb_interval": "2"}, {"stall_limit": "5"}, {"record": ""}):
        with pytest.raises(OptionError, match=f"--cf-{next(iter(given)).replace('_', '-')}: .* is expected"):
            read_mapping(given)


@pytest.mark.parametrize(
    "given",
    [
        {1: 2},
        {"stall_limit": float("nan")},
        {"eplb_interval": True},
        {"eplb": True, "eplb_clones_per_rank": 10**18},
        {"record": 3},
        {"schedule": ["1f1b"]},
        {"overlap": None},
        {"platform": {}},
        ["schedule"],
        "schedule",
    ],
)
def test_a_hostile_mapping_is_refused_in_one_line(given: object) -> None:
    with refuses("", OptionError):
        merge_options(read_values(given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argv", "under", "expected"),
    [
        # Also where the flag says what is the default anyway.
        ("--cf-eplb --cf-eplb-clones-per-rank 1", {"eplb": True, "eplb_clones_per_rank": 3}, Options(eplb=True)),
        ("--cf-platform auto", {"platform": "cpu"}, Options()),
        ("--no-cf-overlap", {"schedule": "dualpipev", "overlap": True}, Options(schedule="dualpipev")),
        ("--no-cf-eplb", {"eplb": True, "eplb_interval": 4}, Options(eplb=False, eplb_interval=4)),
        ("--cf-schedule dualpipev", {"schedule": "1f1b", "stall_limit": 3}, Options(schedule="dualpipev", stall_limit=3)),
        # What belongs together may come from two places.
        ("--cf-eplb-interval 4", {"eplb": True}, Options(eplb=True, eplb_interval=4)),
        ("", {"schedule": "1f1b"}, Options(schedule="1f1b")),
    ],
)
def test_flags_win_whatever_their_value(argv: str, under: dict[str, object], expected: Options) -> None:
    assert merge_options(read_values(under), read_flags(argv.split())) == expected


def test_what_was_merged_is_checked_as_a_whole() -> None:
    with pytest.raises(OptionError, match="--cf-eplb-clones-per-rank 0 leaves nothing to balance with"):
        never = read_flags(["--cf-eplb", "--cf-eplb-rehome-interval", "never"])
        merge_options(read_values({"eplb_clones_per_rank": 0}), never)
    with pytest.raises(OptionError, match="--cf-eplb-split is for --cf-eplb, which is not given"):
        merge_options(read_values({"eplb_split": "even"}), read_flags(["--cf-schedule", "1f1b"]))


def test_options_made_elsewhere_give_what_was_set() -> None:
    assert read_values(Options(schedule="1f1b", platform="auto")) == {"schedule": "1f1b", "platform": "auto"}


def test_every_option_has_a_flag_with_its_words_under_one_heading() -> None:
    parser = add_flags(argparse.ArgumentParser())
    text = " ".join(parser.format_help().split())
    assert text.count("counterflow:") == 1
    for name, field in Options.model_fields.items():
        assert f"--cf-{name.replace('_', '-')}" in text
        assert field.description and field.description.split(";")[0].split("--")[0].strip() in text


def test_the_page_of_options_is_made_from_them() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "options.md"
    assert describe_options() in page.read_text(), "run: python scripts/write_options.py"


def test_steps_to_profile_are_read_from_all_sources() -> None:
    assert Options(schedule="1f1b", profile="7").profile_steps == (7, 7)
    assert Options(schedule="1f1b", **read_values({"profile": 7})).profile_steps == (7, 7)
    assert merge_options(read_flags("--cf-schedule 1f1b --cf-profile 3:12".split())).profile_steps == (3, 12)
    assert Options(schedule="1f1b").profile_folder == Path("runs/profile")
    assert Options(schedule="1f1b", record=Path("x")).profile_folder == Path("x")


@pytest.mark.parametrize(
    ("plan", "buffers", "predicted", "of_a_layer", "shared"),
    [
        ("predicted", "per-layer", 2, 2, 0),
        ("predicted", "shared", 2, 0, 2),
        ("exact", "shared", 0, 0, 2),
        ("auto", "per-layer", 2, 2, 2),
        ("auto", "shared", 2, 0, 4),
    ],
)
def test_slots_are_those_of_the_plan(plan: Any, buffers: Any, predicted: int, of_a_layer: int, shared: int) -> None:
    options = Options(eplb=True, eplb_clones_per_rank=2, eplb_plan=plan, eplb_buffers=buffers)
    assert (options.predicted_clones, options.layer_clones, options.shared_clones) == (predicted, of_a_layer, shared)
