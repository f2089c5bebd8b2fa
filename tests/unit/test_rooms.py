"""Imports point downward only, and importing the plugin does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "plugin" / "counterflow"

# What each room may import of the project; what it may import of the heavy world. A sub-room's rooms are named in full.
COMMON = {"arrays", "bounds", "compiling", "errors", "version"}
ADAPTER = COMMON | {"options", "patching", "schedule", "balance", "runtime", "moe", "trainer"}
TRAINER_WORLD = {"torch", "megatron"}
ROOMS = {
    "errors": (set(), set()),
    "arrays": (set(), set()),
    "version": (set(), set()),
    "compiling": (set(), set()),
    "patching": (set(), set()),
    "bounds": (COMMON, set()),
    "options": (COMMON | {"schedule"}, set()),
    "schedule": (COMMON, set()),
    "balance": (COMMON, set()),
    "balance.kernels": (COMMON, set()),
    "balance.files": (COMMON | {"balance"}, set()),
    "runtime": (COMMON | {"schedule"}, {"torch"}),
    "moe": (COMMON | {"balance"}, {"torch"}),
    "trainer": (COMMON | {"options", "patching", "schedule", "balance", "runtime", "moe"}, {"torch"}),
    "platform": (COMMON | {"patching"}, TRAINER_WORLD),
    "megatron": (ADAPTER, TRAINER_WORLD),
    "megatron.v_layout": (ADAPTER, TRAINER_WORLD),
    "megatron.pipeline": (ADAPTER | {"megatron.loop", "megatron.v_layout"}, TRAINER_WORLD),
    "megatron.experts": (ADAPTER | {"megatron.loop", "megatron.checks"}, TRAINER_WORLD),
    "launch": (COMMON | {"options"}, set()),
    "report": (COMMON | {"schedule", "balance"}, set()),
    "commands": (COMMON | {"options", "platform", "megatron", "schedule", "balance", "report"}, {"torch"}),
    "__init__": (COMMON | {"options", "patching", "platform", "megatron"}, set()),
}
HEAVY = {"torch", "megatron", "deepspeed", "transformer_engine"}


def list_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def find_room(module: list[str]) -> str:
    """Return the innermost room of ROOMS that a module, as parts of its name, is in."""
    return next((name for size in range(len(module), 0, -1) if (name := ".".join(module[:size])) in ROOMS), "")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    room = find_room(list(path.relative_to(PACKAGE).with_suffix("").parts))
    assert room, f"{path}: a new room; say in ROOMS what it may import"
    inner, outer = ROOMS[room]
    for name in list_imports(path):
        top, *rest = name.split(".")
        if top == "counterflow" and rest:
            names = {".".join(rest[:size]) for size in range(1, len(rest) + 1)}
            is_own = find_room(rest) == room or name == f"counterflow.{room}"
            # A room knows its own sub-rooms, unless one of them knows it.
            is_below = find_room(rest).startswith(f"{room}.") and room not in ROOMS[find_room(rest)][0]
            assert is_own or is_below or names & inner, f"{path.name} ({room}) must not import {name}"
        if top in HEAVY:
            assert top in outer, f"{path.name} ({room}) must not import {top}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    # A package's own module hands on what its modules hold: they are what is looked at.
    left = {name: list_imports(path) & set(names) - {name} for name, path in names.items() if path.name != "__init__.py"}
    while ended := [name for name, imports in left.items() if not imports & set(left)]:
        for name in ended:
            del left[name]
    assert not left, f"these import each other in a circle, or need one that does: {sorted(left)}"


def test_importing_loads_no_torch_and_no_megatron() -> None:
    code = (
        "import sys, counterflow.options, counterflow.report, counterflow.schedule; "
        "import counterflow.commands.schedule, counterflow.commands.balance; "
        "print([m for m in ('torch', 'megatron', 'numba', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
