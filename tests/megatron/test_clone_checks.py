"""Which FP8 runs have clones and homes that move, and which are refused in one line before any process group is made."""

from argparse import Namespace
from typing import Any

import pytest

from counterflow.megatron import engine_checks
from counterflow.megatron.checks import prepare_arguments
from counterflow.options import Options
from tests.support.running import refuses

CHOSEN = [
    {"eplb_clones_per_rank": 1},
    {"eplb_clones_per_rank": 0, "eplb_rehome_interval": 1},
    {"eplb_clones_per_rank": 1, "eplb_rehome_interval": 1},
]


def make_arguments(**given: Any) -> Namespace:
    """Arguments as Megatron parses them, of a model with experts in FP8."""
    base = {
        "world_size": 4,
        "num_layers": 8,
        "num_experts": 8,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "transformer_impl": "transformer_engine",
        "fp8": "e4m3",
    }
    return Namespace(**base, **given)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is installed, and nothing asks its own code."""
    monkeypatch.setattr(engine_checks, "is_installed", lambda: True)
    monkeypatch.setattr(engine_checks, "find_fault", lambda: None)


# Megatron's recipe is delayed where none is given.
@pytest.mark.parametrize("given", [{"fp8_recipe": "delayed"}, {"fp8_recipe": None}, {}])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_delayed_scales_have_neither_clones_nor_moved_homes(given: dict[str, Any], chosen: dict[str, Any]) -> None:
    with refuses("--cf-eplb does not run with --fp8-recipe delayed, whose scales are another expert's history once a clone"):
        prepare_arguments(make_arguments(**given), Options(eplb=True, **chosen))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_homes_whose_weights_are_fp8_have_neither(recipe: str, chosen: dict[str, Any]) -> None:
    args = make_arguments(fp8_recipe=recipe, fp8_param_gather=True)
    with refuses("--cf-eplb does not run with --fp8-param-gather (in FP8 without it, clones already receive FP8 weights)"):
        prepare_arguments(args, Options(eplb=True, **chosen))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_scales_of_the_step_itself_have_both(recipe: str, chosen: dict[str, Any]) -> None:
    prepare_arguments(make_arguments(fp8_recipe=recipe), Options(eplb=True, **chosen))
