"""Explicit layouts, layers that route by token ids and hyper-connections: what cannot be laid out is refused in one line."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from counterflow.errors import OptionError
from counterflow.megatron.checks import prepare_arguments
from counterflow.megatron.streams import check_streams, count_streams
from counterflow.options import Options
from tests.support.running import refuses


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def prepare(schedule: str, **given: Any) -> None:
    """Check the arguments of a run of two pipeline ranks and eight layers."""
    base = {
        "world_size": 4,
        "num_layers": 8,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "num_virtual_stages_per_pipeline_rank": None,
        "untie_embeddings_and_output_weights": True,
    }
    prepare_arguments(Namespace(**{**base, **given}), Options(schedule=schedule))


@pytest.mark.parametrize(
    ("schedule", "layout", "said"),
    [
        ("dualpipev", "Et|tt|tt|tt|tL", "'Et|tt|tt|tt|tL' on 2 pipeline ranks: it has 5 stages, give a multiple of 2"),
        ("dualpipev", "Et|tt|tt|tL", "it has 6 layers (t) and --num-layers is 8: change one of the two"),
        ("dualpipev", "tt|Ett|tt|ttL", "The first layer must be embedding"),
        ("1f1b", "Etttt|tttt", "The last layer must be loss"),
        ("1f1b", "Et?tt|ttttL", "'Et?tt|ttttL' cannot be read"),
        ("dualpipev", "Ett|tt|tt|(tt", "'Ett|tt|tt|(tt' cannot be read"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_in_one_line(schedule: str, layout: str, said: str) -> None:
    with refuses(said, OptionError):
        prepare(schedule, pipeline_model_parallel_layout=layout)


@pytest.mark.parametrize(
    ("schedule", "layout"), [("dualpipev", "E|tttt|ttt|tL"), ("dualpipev", "Ettt|tt|tt|tL"), ("1f1b", "Et*4|t*4,L")]
)
def test_a_layout_that_fits_is_taken(schedule: str, layout: str) -> None:
    prepare(schedule, pipeline_model_parallel_layout=layout)


@pytest.mark.parametrize("schedule", ["dualpipev", "zbv", "dualpipe"])
def test_layers_that_read_token_ids_stand_with_the_embedding(schedule: str) -> None:
    hashed = {"moe_n_hash_layers": 2}
    prepare(schedule, **hashed, pipeline_model_parallel_layout="Ett|tt|tt|ttL")
    with refuses(
        "the first stage of --pipeline-model-parallel-layout 'Et|ttt|tt|ttL' has 1 layers (t): move 2 there", OptionError
    ):
        prepare(schedule, **hashed, pipeline_model_parallel_layout="Et|ttt|tt|ttL")
    with refuses("takes an explicit layout for it: give --pipeline-model-parallel-layout", OptionError):
        prepare(schedule, **hashed)
    pattern = {"num_layers": None, "moe_n_hash_layers": 4}
    prepare(schedule, **pattern, hybrid_layer_pattern="*E*E|*E|*E|*E")
    prepare(schedule, **pattern, hybrid_layer_pattern="*E*|*E|*E|*E")
    for cut in ("*E*|E*E|*E|*E", "*E*E*E*E"):
        with refuses("move the first | to after layer 4", OptionError):
            prepare(schedule, **pattern, hybrid_layer_pattern=cut)


def test_streams_make_messages_wider() -> None:
    assert count_streams(SimpleNamespace(enable_mhc_connections=False, mhc_num_residual_streams=4)) == 1
    assert count_streams(SimpleNamespace(enable_mhc_connections=True, mhc_num_residual_streams=4)) == 4
    assert count_streams(SimpleNamespace(enable_hyper_connections=True, num_residual_streams=2)) == 2


def test_hyper_connections_are_taken_where_megatron_takes_them_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(enable_mhc_connections=True)
    built: list[dict[str, Any]] = []

    def build(**given: Any) -> Any:
        built.append(given)
        return TransformerConfig(**{name: value for name, value in given.items() if name != "enable_mhc_connections"})

    monkeypatch.setattr("counterflow.megatron.streams.TransformerConfig", build)
    check_streams(args, "dualpipev")
    assert built[0]["enable_mhc_connections"] is True and built[0]["pipeline_model_parallel_size"] == 2

    def refuse(**given: Any) -> Any:
        raise NotImplementedError("enable_mhc_connections does not support pipelines yet. Use one.\nMore.")

    monkeypatch.setattr("counterflow.megatron.streams.TransformerConfig", refuse)
    with refuses("does not on several pipeline ranks (enable_mhc_connections does not support pipelines yet)", OptionError):
        check_streams(args, "dualpipev")
