"""A wheel holds all that the commands need, and what names a version names the same one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from counterflow.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, folder: Path, **settings: str) -> str:
    environment = {**os.environ, **settings}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel, built from a copy: a folder build/ of the checkout would leak into it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    shutil.copytree(ROOT / "plugin", copy / "plugin", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy, folder=folder)
    (wheel,) = folder.glob("counterflow-*.whl")
    assert wheel.name.startswith(f"counterflow-{__version__}-")
    run(*pip, "install", "--no-deps", "--no-index", "--target", folder / "installed", wheel, folder=folder)
    return folder / "installed"


@pytest.mark.slow
def test_a_wheel_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = {"PYTHONPATH": str(installed)}
    code = "import counterflow; print(counterflow.__file__)"
    assert run(sys.executable, "-c", code, folder=tmp_path, **where).startswith(str(installed))
    show = "schedule show dualpipev --ranks 4 --microbatches 8 --html page.html".split()
    assert "dualpipev" in run(sys.executable, installed / "bin" / "counterflow", *show, folder=tmp_path, **where)
    assert (tmp_path / "page.html").stat().st_size > 10_000
    usage = run(sys.executable, "-m", "counterflow.launch", "--help", folder=tmp_path, **where)
    assert "--cf-schedule" in usage


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    def list_files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}

    source = list_files(ROOT / "plugin" / "counterflow")
    assert Path("py.typed") in source
    assert list_files(installed / "counterflow") == source


def test_the_changelog_and_the_citation_name_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"`v{__version__}`" in (ROOT / "CHANGELOG.md").read_text()
