"""The stand-in for Transformer Engine's compiled module, beside torch and Transformer Engine's own reference."""

import sys
from pathlib import Path
from typing import Any

import pytest

from counterflow.platform import engine
from te_checks import LINEARS, NORMS
from tests.support.forked_ranks import run_ranks
from tests.support.running import refuses

HOPPER, BLACKWELL = "9.0", "10.0"
NUMBERS = {"fp32": HOPPER, "bf16": HOPPER, "delayed": HOPPER, "tensorwise": HOPPER, "blockwise": HOPPER, "mxfp8": BLACKWELL}
CHECKS = "attention current_scaling block_scaling histories adam stale_transpose refusals other_processes".split()


def check(name: str, logs: Path, *arguments: Any, capability: str = HOPPER, ranks: int = 1) -> None:
    run_ranks("te_checks", {"check": f"check_{name}", "arguments": arguments}, ranks, logs, capability=capability)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("kind", [*LINEARS, *NORMS])
def test_a_module_computes_what_torch_does(kind: str, numbers: str, tmp_path: Path) -> None:
    check("module", tmp_path, kind, numbers, capability=NUMBERS[numbers])


@pytest.mark.parametrize("kind", ["Linear", "GroupedLinear"])
@pytest.mark.parametrize("numbers", ["delayed", "tensorwise", "blockwise"])
def test_a_module_computes_the_same_where_no_transposes_are_kept(kind: str, numbers: str, tmp_path: Path) -> None:
    check("module", tmp_path, kind, numbers, capability=BLACKWELL)


@pytest.mark.parametrize("name", CHECKS)
def test_the_stand_in_on_hopper(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", ["current_scaling", "group_scaling"])
def test_the_stand_in_on_blackwell(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, capability=BLACKWELL)


def test_a_gather_of_mixed_types_is_whole(tmp_path: Path) -> None:
    check("gather_of_mixed_types", tmp_path, ranks=2)


def test_it_is_asked_for_by_megatrons_flag() -> None:
    assert engine.asks_for_engine("--bf16 --transformer-impl transformer_engine".split())
    assert engine.asks_for_engine(["--transformer-impl=transformer_engine"])
    assert not engine.asks_for_engine("--transformer-impl transformer_engine --transformer-impl local".split())
    assert not engine.asks_for_engine([])
    assert not engine.asks_for_engine(["--transformer-impl"])


@pytest.mark.parametrize(
    "text", ["transformer_impl: transformer_engine", "language_model:\n  transformer_impl: transformer_engine"]
)
def test_it_is_asked_for_by_megatrons_yaml_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text(f"{text}\nmodel_parallel: {{}}\n")
    assert engine.asks_for_engine(["--yaml-cfg", str(file)])
    file.write_text("transformer_impl: local\n")
    assert not engine.asks_for_engine([f"--yaml-cfg={file}", "--transformer-impl", "transformer_engine"]), (
        "flags are not read then"
    )
    file.write_text("a: [")
    assert not engine.asks_for_engine(["--yaml-cfg", str(file)])
    assert not engine.asks_for_engine(["--yaml-cfg", str(tmp_path / "none.yaml")])


def test_another_gpu_than_the_two_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.VARIABLE, "8.0")
    with refuses("COUNTERFLOW_CPU_CAPABILITY=8.0 given, 9.0 (Hopper) or 10.0 (Blackwell) are allowed"):
        engine.read_capability()


@pytest.mark.parametrize(
    ("version", "is_compiled", "said"),
    [
        (None, False, f"needs Transformer Engine's Python files, which are not installed: run '{sys.executable} -m"),
        ("2.20.2", True, "Transformer Engine 2.20.2 is compiled for a GPU here and the CPU platform does not stand in for it"),
        ("2.19.0", False, "knows Transformer Engine 2.20.2, 2.19.0 is installed"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    version: str | None, is_compiled: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "find_version", lambda: version)
    monkeypatch.setattr(engine, "_is_compiled", lambda: is_compiled)
    with refuses(said):
        engine._find_files()
    assert ("Hopper" in engine.describe()) is (version == "2.19.0")


def test_files_beside_torch_without_their_compiled_part_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "transformer_engine-2.20.2.dist-info"
    home.mkdir()
    (home / "METADATA").write_text("Name: transformer-engine\nVersion: 2.20.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with refuses("Transformer Engine 2.20.2 is installed beside torch without its compiled part, so nothing can import it"):
        engine._find_files()
