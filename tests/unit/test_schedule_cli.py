"""``counterflow schedule`` as a user types it: what it prints, what it writes, and one line for bad input."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from counterflow.schedule import build, read_csv, validate
from tests.support.running import check_refusal

Command = Callable[..., str]


def test_show_draws_and_writes_what_is_asked_for(tmp_path: Path, command: Command) -> None:
    paths = {kind: tmp_path / f"out.{kind}" for kind in ("html", "svg", "trace", "csv")}
    files = [part for kind, path in paths.items() for part in (f"--{kind}", path)]
    out = command("schedule show dualpipev --ranks 4 --microbatches 10 --overlap 0.8", *files)
    assert "makespan 28.8" in out and "rank 3" in out and "2 under blocking P2P, 1 under batched P2P" in out
    assert read_csv(paths["csv"]).actions == build("dualpipev", 4, 10).actions
    assert paths["html"].read_text().lstrip().startswith("<!DOCTYPE html>")
    assert ElementTree.parse(paths["svg"]).getroot().tag.endswith("svg")
    assert json.loads(paths["trace"].read_text())["traceEvents"]


def test_show_reads_a_file_and_prints_json(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "table.csv"
    command("schedule show zbv --ranks 4 --microbatches 8 --csv", path)
    figures = json.loads(command("schedule show --json --activation-bytes 10 --f 1,1,1,1,1,1,1,2", path))
    assert figures["layout"] == "v" and figures["peak_activations"] == [4.0] * 4 and figures["peak_bytes"] == [80.0] * 4


def test_show_says_that_forwards_alone_do_not_train(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "forwards.csv"
    path.write_text("0F0,0F1\n1F0,1F1\n")
    out = command("schedule show", path)
    assert "makespan 3" in out and "forwards alone: a step of evaluation, not a table to train with" in out
    assert "forwards alone" not in command("schedule show 1f1b --ranks 2 --microbatches 2")
    out = command("schedule compare --ranks 2 --microbatches 2", path)
    assert "straight" in out and " 3 " in out


def test_compare_lists_the_fastest_first(tmp_path: Path, command: Command) -> None:
    sizes = "--ranks 8 --microbatches 32 --overlap 0.8 --max-chunks 4"
    lines = command(f"schedule compare {sizes}").splitlines()
    assert "interleaved vpp 4 ep-overlap" in lines[1] and "85.8" in lines[1]
    assert "dualpipev" in lines[2] and "86.8" in lines[2] and "8.5" in lines[2]
    stopping = command(f"schedule compare 1f1b {sizes} --p2p 0.1 --p2p-stops --json")
    beside = command(f"schedule compare 1f1b {sizes} --p2p 0.1 --json")
    assert json.loads(stopping)[0]["makespan"] > json.loads(beside)[0]["makespan"]
    html = tmp_path / "compare.html"
    out = command(f"schedule compare 1f1b zbv {sizes} --json --html", html)
    assert [row["schedule"] for row in json.loads(out)] == ["zbv", "1f1b"]
    assert html.stat().st_size > 10_000


def test_search_keeps_the_cap_and_says_how_far_it_is(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "found.csv"
    search = "schedule search --ranks 4 --microbatches 8 --overlap 0.8 --max-activations 4.5 --seconds 0.5"
    out = command(f"{search} --csv", path)
    assert "lower bound" in out and "best family" in out
    validate(read_csv(path), max_activations=4.5)
    figures = json.loads(command(f"{search} --json"))
    assert figures["lower_bound"] <= figures["makespan"]


def test_a_table_with_a_byte_order_mark_is_read(tmp_path: Path, command: Command) -> None:
    (tmp_path / "bom.csv").write_text("\ufeff0F0,0B0\n", encoding="utf-8")
    assert json.loads(command("schedule show --json", tmp_path / "bom.csv"))["ranks"] == 1


def test_free_actions_have_figures_that_are_numbers(command: Command) -> None:
    for line in ("show zbv", "compare"):
        out = command(f"schedule {line} --ranks 2 --microbatches 8 --f 0 --i 0 --w 0 --json")
        assert json.loads(out, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("show dualpipe --ranks 5 --microbatches 20", "needs an even number of ranks"),
        ("show dualpipev --ranks 4 --microbatches 7", "needs at least 8 micro-batches"),
        ("show zigzag --ranks 4 --microbatches 8", "schedule 'zigzag' is not known; allowed: gpipe, 1f1b"),
        ("show 1f1b", "given without its size; add --ranks P and --microbatches M"),
        ("show 1f1b --ranks 0 --microbatches 8", "--ranks 0 given; allowed: a whole number from 1 to 256"),
        ("show none.csv", "none.csv: cannot be read as a schedule table"),
        ("show {bad}", "{bad}: line 2, cell 1: '1X0' is not an action"),
        ("show {twice}", "{twice}: line 1, cell 2, rank 0, position 1, action 0F0: 0F0 is computed twice"),
        ("show {good} --ranks 3", "--ranks 3 given; {good} has 1: drop --ranks"),
        ("show 1f1b --ranks 2 --microbatches 2 --f -1", "--f -1.0 given; allowed: a finite number from 0 to 1e+30"),
        ("show 1f1b --ranks 2 --microbatches 2 --w nan", "--w nan given"),
        ("show 1f1b --ranks 2 --microbatches 2 --f 1,2,3", "cost f has 3 numbers; the layout has 2 stages"),
        ("show 1f1b --ranks 2 --microbatches 2 --svg nowhere/x.svg", "there is no folder nowhere"),
        ("show 1f1b --ranks 2 --microbatches 2 --html /proc/x.html", "--html /proc/x.html cannot be written"),
        ("compare --ranks 2 --microbatches 8 --max-activations 0.1", "no schedule fits 2 ranks"),
        ("compare 1f1b zbv --ranks 2 --microbatches 8 --csv x.csv", "takes one table and 2 were compared"),
        (
            "compare 1f1b {forwards} gpipe --ranks 1 --microbatches 2",
            "{forwards} has forwards alone and gpipe backwards too: compare the two kinds apart",
        ),
        ("search --ranks 2 --microbatches 8 --max-activations 0.1", "the smallest cap that does is 1"),
        ("search --ranks 2 --microbatches 8 --max-chunks 0", "--max-chunks 0 given"),
        ("compare --ranks 2 --microbatches 8 --max-chunks 0", "--max-chunks 0 given"),
        ("search --ranks 2 --microbatches 8 --f 0 --i 0 --w 0", "costs f, i and w of 0 given"),
        ("search --ranks 2 --microbatches 8 --f 1e300", "--f 1e+300 given; allowed: a finite number from 0"),
        ("search --ranks 2 --microbatches 8 --seconds nan", "--seconds nan given; allowed: a finite number"),
        ("search --ranks 2 --microbatches 8 --seconds 1e5", "--seconds 100000.0 given"),
        ("search --ranks 2 --microbatches 8 --seed -1", "--seed -1 given; allowed: a whole number from 0"),
        ("search --ranks 256 --microbatches 8", "256 ranks x 2 chunks given; allowed: 256 stages at most"),
        ("show 1f1b --ranks 100000 --microbatches 100000", "--ranks 100000 given; allowed: a whole number"),
        ("show 1f1b --ranks 256 --microbatches 100000", "runs of a chunk; allowed: 131,072 at most"),
        ("compare --ranks 64 --microbatches 1024", "runs of a chunk; allowed: 65,536 at most"),
        ("show 1f1b --ranks 2 --microbatches " + "9" * 5000, "given; allowed: a whole number from 1"),
        ("show 1f1b --ranks", "--ranks: expected one argument; see counterflow schedule show --help"),
        ("show", "the following arguments are required"),
        ("show \ud800.csv", "cannot be read as a schedule table"),
    ],
)
def test_bad_input_gets_one_line(argv: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"bad": "0F0,0B0\n1X0\n", "twice": "0F0,0F0,0B0\n", "good": "0F0,0B0\n", "forwards": "0F0,0F1\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    names = {name: str(tmp_path / f"{name}.csv") for name in files}
    check_refusal(["schedule", *[part.format(**names) for part in argv.split()]], said.format(**names), capsys)


@pytest.mark.parametrize("argv", [["--help"], ["show", "--help"], ["compare", "--help"], ["search", "--help"]])
def test_help_is_there(argv: list[str], command: Command) -> None:
    assert "usage: counterflow schedule" in command("schedule", *argv)
