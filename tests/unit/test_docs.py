"""What the documentation shows runs and prints what it says."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT
from tests.support.made_record import make_record
from tests.support.running import run_python

pytestmark = pytest.mark.slow

PAGES = sorted(
    path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
)
COLUMNS = 130


def find_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def run_command(command: str, folder: Path) -> None:
    run_python("-m", "counterflow.commands.main", *shlex.split(command), cwd=folder)


def test_adding_a_schedule_works_as_the_page_says(tmp_path: Path) -> None:
    page = "docs/add-a-schedule.md"
    (code, _), (expected,), (console,) = (find_blocks(page, language) for language in ("python", "text", "console"))
    assert run_python("-c", code, cwd=tmp_path) == expected
    (command,) = re.findall(r"^\$ counterflow (.*)$", console, flags=re.MULTILINE)
    run_command(command, tmp_path)
    assert (tmp_path / "gpipe-lifo.html").stat().st_size > 10_000


@pytest.mark.parametrize("page", ["docs/schedules.md", "docs/reports.md", "README.md"])
def test_schedule_commands_in_the_docs_are_understood(page: str, tmp_path: Path) -> None:
    for block in find_blocks(page, "console"):
        for command in re.findall(r"^\$ counterflow (schedule .*)$", block, flags=re.MULTILINE):
            if "search" in command:
                command += " --seconds 0.2"
            run_command(command, tmp_path)


def test_balance_commands_in_the_docs_are_understood(tmp_path: Path) -> None:
    np.savez(tmp_path / "loads.npz", loads=np.random.default_rng(0).lognormal(0, 1, (2, 256)))
    trace = (ROOT / "examples" / "routing.npz").read_bytes()
    for name in ("trace.npz", "routing_a.npz", "examples/routing.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(trace)
    make_record(tmp_path / "runs" / "record", {0: [1, 2], 4: [3, 4]}, range(1, 31))
    commands = [
        command
        for page in ("docs/balance.md", "README.md")
        for block in find_blocks(page, "console")
        for command in re.findall(r"^\$ counterflow (balance .*)$", block, flags=re.MULTILINE)
    ]
    assert len(commands) >= 7
    for command in commands:
        run_command(command, tmp_path)


def strip_code(text: str) -> str:
    """Empty the lines of code blocks."""
    return re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def name_anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", strip_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_are_wrapped(page: Path) -> None:
    lines = strip_code((ROOT / page).read_text()).splitlines()
    long = [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS and not line.startswith("|")]
    assert not long, f"{page}: lines {long} have more than {COLUMNS} columns: run python scripts/wrap_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_no_link_is_dead(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", strip_code((ROOT / page).read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        assert not anchor or anchor in name_anchors(linked), f"{page} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_pages_name_exist(page: Path) -> None:
    """A path in back-quotes is one of the repository, of the package, or of a folder beside the page."""
    roots = (ROOT, ROOT / "plugin" / "counterflow", (ROOT / page).parent)
    rooms = "|".join(sorted({path.name for root in roots[:2] for path in root.iterdir() if path.is_dir()} - {"runs"}))
    for path in re.findall(rf"`((?:counterflow/)?(?:{rooms})/[\w./-]+\.(?:py|md|args|toml|npz|sh))`", (ROOT / page).read_text()):
        found = any((root / path.removeprefix("counterflow/")).exists() for root in roots)
        assert found or "*" in path, f"{page} names {path}, which does not exist"


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path: Path) -> None:
    (block,) = find_blocks("docs/images/README.md", "console")
    (command,) = re.findall(r"^\$ counterflow (.*)$", block, flags=re.MULTILINE)
    run_command(command, tmp_path)
    (drawn,) = tmp_path.glob("*.svg")
    texts = [re.findall(r">([^<>]+)</", path.read_text()) for path in (drawn, ROOT / "docs" / "images" / drawn.name)]
    assert texts[0] == texts[1], f"run this in docs/images: counterflow {command}"
