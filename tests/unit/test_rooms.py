"""Imports point downward only, and importing the plugin does nothing."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.running import run_python

PACKAGE = ROOT / "plugin" / "counterflow"

# What each room may import of the project; what it may import of the heavy world. A sub-room's rooms are named in full.
COMMON = {"arrays", "bounds", "compiling", "errors", "version"}
ADAPTER = COMMON | {"devices", "options", "patching", "sections", "schedule", "balance", "runtime", "moe", "trainer"}
# What the sub-rooms of the adapter share.
SHARED = {"megatron.gradients", "megatron.loop", "megatron.state"}
TRAINER_WORLD = {"torch", "megatron"}
DEEPSPEED_WORLD = {"torch", "deepspeed"}
ROOMS = {
    "errors": (set(), set()),
    "arrays": (set(), set()),
    "version": (set(), set()),
    "compiling": (set(), set()),
    "patching": (set(), set()),
    "devices": (set(), {"torch"}),
    "groups": (COMMON | {"patching"}, {"torch"}),
    "bounds": (COMMON, set()),
    "options": (COMMON | {"schedule"}, set()),
    "sections": (COMMON | {"options", "schedule"}, set()),
    "schedule": (COMMON, set()),
    "balance": (COMMON, set()),
    "balance.kernels": (COMMON, set()),
    "balance.files": (COMMON | {"balance"}, set()),
    "analysis": (COMMON | {"schedule"}, set()),
    "planner": (COMMON | {"schedule", "balance", "analysis"}, set()),
    "runtime": (COMMON | {"devices", "groups", "schedule"}, {"torch"}),
    "moe": (COMMON | {"devices", "groups", "balance"}, {"torch"}),
    "trainer": (
        COMMON | {"devices", "groups", "options", "patching", "schedule", "sections", "balance", "runtime", "moe", "analysis"},
        {"torch"},
    ),
    "platform": (COMMON | {"patching", "platform.engine"}, TRAINER_WORLD),
    "platform.engine": (COMMON | {"patching"}, {"torch", "transformer_engine"}),
    "megatron": (ADAPTER, TRAINER_WORLD),
    "megatron.v_layout": (ADAPTER | {"megatron.state"}, TRAINER_WORLD),
    "megatron.pipeline": (ADAPTER | SHARED | {"megatron.streams", "megatron.v_layout"}, TRAINER_WORLD),
    "megatron.experts": (ADAPTER | SHARED | {"megatron.checks"}, TRAINER_WORLD),
    "megatron.dry_run": (COMMON | {"planner", "platform", "platform.engine", "schedule"}, TRAINER_WORLD),
    "deepspeed": (ADAPTER, DEEPSPEED_WORLD),
    "deepspeed.pipeline": (ADAPTER | {"deepspeed.state"}, DEEPSPEED_WORLD),
    "deepspeed.experts": (ADAPTER | {"deepspeed.checks", "deepspeed.stages", "deepspeed.state"}, DEEPSPEED_WORLD),
    "launch": (COMMON | {"options"}, set()),
    "report": (COMMON | {"schedule", "balance", "analysis", "planner"}, set()),
    "commands": (
        COMMON
        | {
            "options",
            "platform",
            "platform.engine",
            "megatron",
            "deepspeed",
            "schedule",
            "balance",
            "analysis",
            "planner",
            "report",
        },
        {"torch"},
    ),
    "__init__": (COMMON | {"options", "patching", "platform", "platform.engine", "megatron", "deepspeed"}, set()),
}
# Words of one trainer, or of one kind of device, that rooms for every trainer do without.
FOREIGN = ("main_grad", "torch.cuda")
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


@pytest.mark.parametrize("room", ["schedule", "balance", "runtime", "moe", "trainer"])
def test_rooms_for_every_trainer_do_not_name_what_one_trainer_has(room: str) -> None:
    paths = sorted((PACKAGE / room).rglob("*.py"))
    assert paths, f"there is no room {room} any more"
    found = [f"{path.relative_to(PACKAGE)}: {word}" for path in paths for word in FOREIGN if word in path.read_text()]
    assert not found, "gradients are reached by moe/gradients.py, devices by devices.py"


@pytest.mark.parametrize("name", ["adapter", "trainer"])
def test_a_second_trainer_needs_nothing_of_the_first(name: str) -> None:
    imports = list_imports(ROOT / "examples" / "stub_trainer" / f"{name}.py")
    assert not {one for one in imports if "megatron" in one or one.startswith("counterflow.platform")}


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    # A package's own module hands on what its modules hold: they are what is looked at.
    left = {name: list_imports(path) & set(names) - {name} for name, path in names.items() if path.name != "__init__.py"}
    while ended := [name for name, imports in left.items() if not imports & set(left)]:
        for name in ended:
            del left[name]
    assert not left, f"these import each other in a circle, or need one that does: {sorted(left)}"


@pytest.mark.slow
def test_importing_loads_no_torch_and_no_megatron() -> None:
    code = (
        "import sys, counterflow.options, counterflow.report, counterflow.schedule; "
        "import counterflow.commands.schedule, counterflow.commands.balance; "
        "print([m for m in ('torch', 'megatron', 'numba', 'scipy') if m in sys.modules])"
    )
    assert run_python("-c", code).strip() == "[]"
