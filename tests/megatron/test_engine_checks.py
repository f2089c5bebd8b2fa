"""Transformer Engine and FP8: what cannot work, or has not been shown to, is refused in one line."""

import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from counterflow.megatron.engine_checks import check_engine
from tests.support.running import refuses

SCHEDULE = "--cf-schedule dualpipev"


def make_arguments(**given: Any) -> Namespace:
    base = {
        "transformer_impl": "transformer_engine",
        "fp8": None,
        "fp8_recipe": "delayed",
        "hidden_size": 64,
        "ffn_hidden_size": 128,
    }
    return Namespace(**{**base, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"use_transformer_engine_op_fuser": True},
            f"{SCHEDULE} does not run with --use-transformer-engine-op-fuser, whose fused",
        ),
        ({"tp_comm_overlap": True}, f"{SCHEDULE} does not run with --tp-comm-overlap, whose user buffers"),
        ({"moe_single_grouped_weight": True}, f"{SCHEDULE} does not run with --moe-single-grouped-weight"),
        ({"moe_single_grouped_bias": True}, f"{SCHEDULE} does not run with --moe-single-grouped-bias"),
        (
            {"fp8": "e4m3", "transformer_impl": "local"},
            "--fp8-format e4m3 needs Transformer Engine's layers, --transformer-impl local",
        ),
        (
            {"fp8": "hybrid", "fp8_param_gather": True, "use_cpu_initialization": True},
            "--fp8-param-gather with --use-cpu-initialization: weights are quantized before they are filled",
        ),
        ({"fp8": "e4m3", "hidden_size": 72}, "takes sizes in multiples of 16, --hidden-size is 72: set it to 64 or 80"),
        ({"fp8": "e4m3", "moe_ffn_hidden_size": 8}, "--moe-ffn-hidden-size is 8: set it to 16"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], said: str) -> None:
    with refuses(said):
        check_engine(make_arguments(**given), SCHEDULE)


@pytest.mark.parametrize("given", [{}, {"fp8": "e4m3"}, {"transformer_impl": "local", "hidden_size": 8}])
def test_what_goes_together_passes(given: dict[str, Any]) -> None:
    check_engine(make_arguments(**given), SCHEDULE)


def test_mxfp8_needs_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wanted = make_arguments(fp8="e4m3", fp8_recipe="mxfp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    check_engine(wanted, SCHEDULE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with refuses("--fp8-recipe mxfp8 needs a GPU of compute capability 10.0 (Blackwell), this one has 9.0"):
        check_engine(wanted, SCHEDULE)


@pytest.mark.parametrize(
    ("given", "said"), [({"context_parallel_size": 2}, "--context-parallel-size 2"), ({"fp4": "e2m1"}, "FP4")]
)
def test_what_the_stand_in_lacks_is_refused_there_alone(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engine(make_arguments(**given), SCHEDULE)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", SimpleNamespace(is_stand_in=True))
    with refuses(said):
        check_engine(make_arguments(**given), SCHEDULE)
