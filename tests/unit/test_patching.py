"""Replacements reach every module that imported by name, and all of them can be taken back."""

import sys
from types import ModuleType

import pytest

from counterflow.patching import Patches


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    home, other = ModuleType("cf_home"), ModuleType("cf_other")
    home.work = other.work = lambda: "original"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cf_home", home)
    monkeypatch.setitem(sys.modules, "cf_other", other)
    return home, other


def test_replace_reaches_importers_and_undo_restores(modules: tuple[ModuleType, ModuleType]) -> None:
    home, other = modules
    patches = Patches()
    patches.replace(home, "work", lambda original: lambda: f"wrapped {original()}")
    assert home.work() == other.work() == "wrapped original"
    patches.undo()
    assert home.work() == other.work() == "original"
    assert not patches


def test_set_of_a_new_name_is_deleted_again(modules: tuple[ModuleType, ModuleType]) -> None:
    home, _ = modules
    patches = Patches()
    patches.set(home, "fresh", 1)
    patches.undo()
    assert not hasattr(home, "fresh")
