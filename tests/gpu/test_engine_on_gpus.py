"""Transformer Engine's layers, compiled, under schedules and recipes; and the CPU platform's stand-in beside its kernels.

Plain Megatron's run of each model is the reference, as on the CPU. Kernels add in orders of their own, so a bound is compared.
"""

import importlib

import pytest

from te_cases import RECIPES
from tests.support.comparing import find_difference
from tests.support.run_cases import Runs

# Relative, on losses: of BF16, and of clones in FP8, whose largest values are those of fewer tokens.
ROUNDING, OF_CLONES = 1e-3, 1e-2
ASKED = {"mxfp8": "is_mxfp8_available", "blockwise": "is_fp8_block_scaling_available"}


def require_recipe(recipe: str) -> None:
    manager = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    is_there, reason = getattr(manager, ASKED.get(recipe, "is_fp8_available"))()
    if not is_there:
        pytest.skip(reason)


def assert_alike(runs: Runs, name: str, reference: str, bound: float) -> None:
    assert runs[name]["steps"], "no step was logged"
    assert find_difference(runs[name], runs[reference], "loss") <= bound


@pytest.mark.parametrize("family", ["zbv", "dualpipev", "dualpipev, whole backwards", "dualpipev, overlapped pairs", "dualpipe"])
def test_bf16(engine_runs: Runs, family: str) -> None:
    assert_alike(engine_runs, f"bf16, {family}", "bf16", ROUNDING)


def test_clones_in_bf16(engine_runs: Runs) -> None:
    assert_alike(engine_runs, "bf16, dualpipev, clones", "bf16", ROUNDING)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["dualpipev", "overlapped pairs"])
def test_fp8(engine_runs: Runs, recipe: str, kind: str) -> None:
    require_recipe(recipe)
    assert_alike(engine_runs, f"{recipe}, {kind}", recipe, ROUNDING)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_weights_that_are_gathered(engine_runs: Runs, recipe: str) -> None:
    require_recipe(recipe)
    assert_alike(engine_runs, f"{recipe}, gathered, dualpipev", f"{recipe}, gathered", ROUNDING)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
def test_clones_in_fp8(engine_runs: Runs, recipe: str) -> None:
    require_recipe(recipe)
    run = engine_runs[f"{recipe}, dualpipev, clones"]
    assert run["clones"]["tokens"] > 0, "no clone had a token"
    assert run["clones"]["wrong"] == 0, "clones have the bits of their homes"
    assert_alike(engine_runs, f"{recipe}, dualpipev, clones", recipe, OF_CLONES)


def test_megatrons_own_hybrid_model(engine_runs: Runs) -> None:
    assert_alike(engine_runs, "hybrid bf16, dualpipev", "hybrid bf16", ROUNDING)
