"""Transformer Engine and FP8: what cannot work, or has not been shown to, is refused in one line."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from counterflow.megatron import engine_checks
from counterflow.megatron.checks import _check_zero_bubble
from counterflow.megatron.engine_checks import check_engine
from counterflow.megatron.pipeline import zero_bubble
from counterflow.options import Options
from counterflow.trainer.tables import splits_backward
from tests.support.running import refuses

SCHEDULE = "--cf-schedule dualpipev"
FIND_FAULT = engine_checks.find_fault


class Manager:
    """Transformer Engine's answers: as on Hopper with CUDA 12.4."""

    is_fp8_available = staticmethod(lambda: (True, ""))
    is_mxfp8_available = staticmethod(lambda: (False, "Device compute capability 10.0 or higher required for MXFP8 execution."))
    is_fp8_block_scaling_available = staticmethod(lambda: (False, "It requires CUDA >= 12.9."))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is installed, and nothing asks its own code."""
    monkeypatch.setattr(engine_checks, "is_installed", lambda: True)
    monkeypatch.setattr(engine_checks, "find_fault", lambda: None)


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


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "mxfp8",
            "compute capability 9.0 and CUDA 12.4: Device compute capability 10.0 or higher required for MXFP8 execution: give",
        ),
        ("blockwise", "It requires CUDA >= 12.9: give --fp8-recipe delayed or tensorwise"),
    ],
)
def test_a_gpu_has_to_have_the_recipe(recipe: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", SimpleNamespace(FP8GlobalStateManager=Manager))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    check_engine(make_arguments(fp8="e4m3", fp8_recipe="tensorwise"), SCHEDULE)
    with refuses(said):
        check_engine(make_arguments(fp8="e4m3", fp8_recipe=recipe), SCHEDULE)


ATTENTION = {"fp8": "e4m3", "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"fp8": "e4m3", "fp8_recipe": "mxfp8", "hidden_size": 48},
            "mxfp8 takes sizes in multiples of 32, --hidden-size is 48: set",
        ),
        ({**ATTENTION, "kv_channels": 6}, "--num-attention-heads 4 x --kv-channels 6 is 24: change one of these"),
        (
            {**ATTENTION, "kv_channels": 4, "group_query_attention": True, "num_query_groups": 1},
            "keys and values, 2 x 1 groups x --kv-channels 4, is 8: change",
        ),
        (
            {"fp8": "e4m3", "ffn_hidden_size": 144, "tensor_model_parallel_size": 2},
            "--ffn-hidden-size 144 / TP 2 is 72: change one of these",
        ),
        ({"fp8": "e4m3", "multi_latent_attention": True, "kv_lora_rank": 24}, "--kv-lora-rank is 24: set it to 16 or 32"),
        (
            {"fp8": "e4m3", "seq_length": 20, "micro_batch_size": 2, "context_parallel_size": 1},
            "--micro-batch-size 2 x --seq-length 20 is 40: change one of these",
        ),
        (
            {"fp8": "e4m3", "seq_length": 16, "micro_batch_size": 1, "tensor_model_parallel_size": 4, "sequence_parallel": True},
            "a rank's part of a sequence in multiples of 8, --micro-batch-size 1 x --seq-length 16 / TP 4 is 4: change",
        ),
        (
            {"fp8": "e4m3", "vocab_size": 257, "make_vocab_size_divisible_by": 1, "fp8_output_proj": True},
            "--vocab-size 257 padded to 257 (--make-vocab-size-divisible-by) is 257: change",
        ),
    ],
)
def test_sizes_that_fp8_cannot_take(given: dict[str, Any], said: str) -> None:
    with refuses(said):
        check_engine(make_arguments(**given), SCHEDULE)


@pytest.mark.parametrize(
    "given",
    [
        {"vocab_size": 257, "make_vocab_size_divisible_by": 1},
        {"num_attention_heads": 4, "kv_channels": 12, "seq_length": 16, "micro_batch_size": 1},
        {"multi_latent_attention": True, "num_attention_heads": 4, "q_lora_rank": 32, "v_head_dim": 4, "kv_channels": 3},
    ],
)
def test_sizes_that_fp8_takes(given: dict[str, Any]) -> None:
    check_engine(make_arguments(fp8="e4m3", **given), SCHEDULE)


def test_weights_in_fp8_need_fp8() -> None:
    with refuses("--fp8-param-gather keeps weights in FP8 and --fp8-format is not given: add it"):
        check_engine(make_arguments(fp8_param_gather=True), SCHEDULE)


def test_transformer_engine_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "is_installed", lambda: False)
    with refuses("--transformer-impl transformer_engine, Megatron's default, needs Transformer Engine, which is not installed"):
        check_engine(make_arguments(), SCHEDULE)
    with refuses("which is not installed"):
        check_engine(make_arguments(spec=["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]), SCHEDULE)
    check_engine(make_arguments(spec=["mine", "layers"]), SCHEDULE)
    check_engine(make_arguments(transformer_impl="local"), SCHEDULE)


@pytest.fixture
def break_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a package of that name whose part for torch raises; returns a function that says what."""
    package = tmp_path / "transformer_engine"
    for home in (package / "pytorch", tmp_path / "transformer_engine-2.9.0.dist-info"):
        home.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "transformer_engine-2.9.0.dist-info" / "METADATA").write_text("Name: transformer-engine\nVersion: 2.9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(engine_checks, "find_fault", FIND_FAULT)

    def raise_in_it(code: str) -> None:
        (package / "pytorch" / "__init__.py").write_text(code)

    yield raise_in_it
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_transformer_engine_that_is_compiled_for_another_torch_is_refused(break_engine: Callable[[str], None]) -> None:
    break_engine("raise ImportError('te.so: undefined symbol: _ZN3c104cuda')")
    # Megatron runs without it, and so do its own layers.
    engine_checks.check_installed()
    with refuses(
        f"Transformer Engine 2.9.0 cannot be imported beside torch {torch.__version__}, as if it were compiled for another"
    ):
        check_engine(make_arguments(), SCHEDULE)
    check_engine(make_arguments(transformer_impl="local"), SCHEDULE)


def test_transformer_engine_that_ends_megatrons_imports_is_refused_whatever_the_layers(
    break_engine: Callable[[str], None],
) -> None:
    break_engine("raise RuntimeError('Found empty meta package')")
    with refuses("(RuntimeError: Found empty meta package): install one for this torch by pip install"):
        engine_checks.check_installed()


@pytest.mark.parametrize(("schedule", "chosen"), [("zbv", {}), ("dualpipev", {"overlap": True}), ("zbv", {"zero_bubble": True})])
def test_transformer_engine_that_is_too_old_for_a_w_is_refused(
    schedule: str, chosen: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_bubble, "find_engine", lambda: "2.7.0")
    with refuses("cannot split Transformer Engine's backward passes, transformer-engine 2.7.0: it needs 2.8.0 or later"):
        _check_zero_bubble(make_arguments(), Options(schedule=schedule, **chosen))
    _check_zero_bubble(make_arguments(), Options(schedule=schedule, **{**chosen, "zero_bubble": False}))
    _check_zero_bubble(make_arguments(), Options(schedule="1f1b"))
    _check_zero_bubble(make_arguments(transformer_impl="local"), Options(schedule=schedule))


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


@pytest.mark.parametrize("options", [{}, {"eplb": True}, {"schedule": "1f1b"}])
def test_weight_gradients_wait_for_a_schedule_that_computes_them(options: dict[str, Any]) -> None:
    assert not splits_backward(Options(**options))
    assert splits_backward(Options(schedule="zbv"))
