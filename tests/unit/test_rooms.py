"""Imports point downward only, and importing the plugin does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "plugin" / "counterflow"

# What each room may import of the project; what it may import of the heavy world.
COMMON = {"bounds", "compiling", "errors", "version"}
ROOMS = {
    "errors": (set(), set()),
    "bounds": (COMMON, set()),
    "arguments": (COMMON, set()),
    "version": (set(), set()),
    "compiling": (set(), set()),
    "patching": (set(), set()),
    "config": (COMMON, set()),
    "schedule": (COMMON, set()),
    "balance": (COMMON, set()),
    "runtime": (COMMON | {"schedule"}, {"torch"}),
    "moe": (COMMON | {"balance"}, {"torch"}),
    "platform": (COMMON | {"patching"}, {"torch", "megatron"}),
    "megatron": (COMMON | {"config", "patching", "schedule", "balance", "runtime", "moe"}, {"torch", "megatron"}),
    "launch": (COMMON | {"config"}, set()),
    "report": (COMMON | {"schedule", "balance"}, set()),
    "schedule_cli": (COMMON | {"arguments", "schedule", "report"}, set()),
    "balance_cli": (COMMON | {"arguments", "balance", "report"}, set()),
    "cli": (COMMON | {"arguments", "config", "platform", "megatron", "schedule_cli", "balance_cli"}, {"torch"}),
    "__init__": (COMMON | {"config", "patching", "platform", "megatron"}, set()),
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ROOMS, f"{path}: a new room; say in ROOMS what it may import"
    inner, outer = ROOMS[room]
    for name in list_imports(path):
        top, *rest = name.split(".")
        if top == "counterflow" and rest:
            assert rest[0] == room or rest[0] in inner, f"{path.name} ({room}) must not import {name}"
        if top in HEAVY:
            assert top in outer, f"{path.name} ({room}) must not import {top}"


def test_importing_loads_no_torch_and_no_megatron() -> None:
    code = (
        "import sys, counterflow.config, counterflow.report, counterflow.schedule; "
        "import counterflow.schedule_cli, counterflow.balance_cli; "
        "print([m for m in ('torch', 'megatron', 'numba', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
