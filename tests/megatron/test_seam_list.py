"""The list of seams is whole: what the plugin replaces, imports and patches in Megatron is in it, and the docs show it."""

import ast
import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import counterflow
from counterflow.errors import SeamError
from counterflow.megatron import install, seams
from counterflow.megatron.seams import KNOWN, REMEDIES, SEAMS, list_seams
from counterflow.patching import Patches
from counterflow.platform import install_cpu
from tests.support import ROOT
from tests.support.running import load_module

ADAPTER = ROOT / "plugin" / "counterflow" / "megatron"
# Apex's extension, which Megatron imports where it is installed; what a module is called.
NOT_MEGATRONS = {"megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda"}


def list_attributes() -> dict[tuple[str, str], Any]:
    """Return what every loaded module of Megatron, and every class in one, has under each name; of torch, its collectives."""
    found = {}
    for name, module in list(sys.modules.items()):
        if (not name.startswith("megatron") and name != "torch.distributed") or not isinstance(module, ModuleType):
            continue
        found |= {(name, key): value for key, value in vars(module).items()}
        classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == name]
        found |= {(f"{name}.{one.__qualname__}", key): value for one in classes for key, value in vars(one).items()}
    return found


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the platform of a CPU in force, so that what the plugin replaces is compared with what is without it."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for seam in list_seams():
        seam.find_owner()
    patches = install_cpu()
    yield
    patches.undo()


def install_all() -> Patches:
    """Put all features in force."""
    # The platform is there already, and stands for a GPU.
    patches = counterflow.enable({"schedule": "dualpipe", "overlap": True, "eplb": True, "platform": "cuda"})
    install.take_seams(patches, [seams.ENGINE])
    return patches


def test_all_that_is_replaced_is_in_the_list_and_all_in_the_list_is_replaced(platform: None) -> None:
    # What the wrappers are in imports more of Megatron.
    install_all().undo()
    before = list_attributes()
    patches = install_all()
    now = list_attributes()
    patches.undo()
    after = list_attributes()
    taken = [seam for seam in list_seams() if seam.wrap is not None]
    originals = {id(before[find_place(seam)]) for seam in taken}
    assert set(now) <= set(before) and set(after) == set(before), "a name of the plugin's own in Megatron"
    changed = {place for place, value in now.items() if value is not before[place]}
    assert not [place for place in changed if id(before[place]) not in originals], "replaced, and no seam says so"
    assert not [seam.path for seam in taken if find_place(seam) not in changed], "a seam is not taken"
    assert not [place for place, value in before.items() if after[place] is not value], "undo left something behind"


@pytest.mark.parametrize(
    ("path", "refused", "remedy", "others"),
    [
        (f"{seams.SCHEDULES}.backward_step", {"schedule": "1f1b"}, "drop --cf-schedule", {"eplb": True}),
        (f"{seams.STATE}._PIPELINE_MODEL_PARALLEL_GROUP", {"schedule": "zbv"}, "another layout", {"schedule": "1f1b"}),
        (f"{seams.STATE}._MPU_DATA_PARALLEL_RANK", {"schedule": "dualpipe"}, "dualpipev", {"schedule": "dualpipev"}),
        (f"{seams.LAYERS}.{seams.LINEAR}", {"schedule": "zb-h1"}, "give --no-cf-zero-bubble", {"schedule": "1f1b"}),
        (f"{seams.MOE_LAYER}.preprocess", {"eplb": True}, "drop --cf-eplb", {"schedule": "dualpipev"}),
        (f"{seams.OPTIMIZER}._get_main_param_and_optimizer_states", {"eplb": True, "eplb_rehome_interval": 1},
         "drop --cf-eplb-rehome-interval", {"eplb": True}),
    ],
)  # fmt: skip
def test_a_missing_symbol_disables_its_feature_alone(
    platform: None, monkeypatch: pytest.MonkeyPatch, path: str, refused: Any, remedy: str, others: Any
) -> None:
    seam = next(seam for seam in SEAMS if seam.path == path)
    # Megatron itself goes on calling what it has, so only the list is told of another name.
    gone = dataclasses.replace(seam, symbol=f"{seam.symbol}_of_old")
    monkeypatch.setattr(seams, "SEAMS", tuple(gone if one is seam else one for one in SEAMS))
    with pytest.raises(SeamError) as raised:
        counterflow.enable({**refused, "platform": "cuda"})
    said = str(raised.value)
    assert f"{gone.path} does not exist" in said and remedy in said and "\n" not in said
    counterflow.enable({**others, "platform": "cuda"}).undo()


def find_place(seam: Any) -> tuple[str, str]:
    owner = seam.find_owner()
    name = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
    return name, seam.symbol


def list_uses(path: Path) -> set[str]:
    """Return what a module of the adapter imports from Megatron, and reads of the modules that it imports, by full name."""
    tree, modules, used = ast.parse(path.read_text()), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "megatron":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if is_module(full):
                    modules[alias.asname or alias.name] = full
                else:
                    used.add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            used.add(f"{modules[node.value.id]}.{node.attr}")
    return {name for name in used if not name.endswith("__")} - NOT_MEGATRONS


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", sorted(ADAPTER.rglob("*.py")), ids=lambda path: str(path.relative_to(ADAPTER)))
def test_all_that_the_adapter_imports_is_in_the_list(path: Path) -> None:
    listed = {seam.path for seam in SEAMS} | {seam.owner for seam in SEAMS}
    assert list_uses(path) <= listed, "not in counterflow/megatron/seams.py"


def test_the_list_has_nothing_that_the_adapter_does_not_use() -> None:
    text = "\n".join(path.read_text() for path in ADAPTER.rglob("*.py") if path.name != "seams.py")
    used = [seam for seam in SEAMS if seam.wrap is None and seam.symbol != "print_rank_last"]
    assert not [seam.path for seam in used if not re.search(rf"\b{seam.symbol}\b", text)]


def test_the_adapter_leaves_no_attribute_of_its_own_on_megatrons_objects() -> None:
    # Arguments are the exception: checkpoints hold them.
    pattern = re.compile(r"(?<!args)(?<!saved_args)\.cf_\w+ = ")
    lines = [(path.name, line) for path in ADAPTER.rglob("*.py") for line in path.read_text().splitlines()]
    found = [f"{name}: {line}" for name, line in lines if pattern.search(line)]
    assert not found, "state.py has a table for each kind of object"


def test_no_symbol_is_wrapped_twice() -> None:
    taken = [seam.path for seam in SEAMS if seam.wrap is not None]
    assert len(taken) == len(set(taken))
    assert all(seam.features and set(seam.features) <= set(REMEDIES) for seam in SEAMS)
    assert all(set(seam.versions) <= set(KNOWN) and list(seam.versions) == sorted(seam.versions) for seam in SEAMS)


def test_the_page_of_seams_is_what_the_list_says() -> None:
    module = load_module(ROOT / "scripts" / "write_seams.py")
    assert module.PAGE.read_text() == module.write_page(), "run python scripts/write_seams.py"


@pytest.mark.parametrize("patch", sorted((ROOT / "patches" / "megatron-lm").rglob("*.patch")), ids=lambda path: path.parent.name)
def test_the_anchor_of_a_patch_file_is_a_seam(patch: Path) -> None:
    text = patch.read_text()
    (changed,) = re.findall(r"^\+\+\+ b/(.*)\.py$", text, flags=re.MULTILINE)
    owner = changed.replace("/", ".").removesuffix(".__init__")
    anchors = [seam for seam in SEAMS if seam.owner == owner and re.search(rf"^ .*\b{seam.symbol}\b", text, flags=re.MULTILINE)]
    assert anchors, f"{owner}: no seam says after which line the patch goes in"
    first, last = patch.parent.name.split("-")
    assert all((seam.versions[0], seam.versions[-1]) == (first, last) for seam in anchors)
