"""HybridModel's pattern: its segments are the stages, and one that does not fit is refused with one that would."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.models.hybrid import hybrid_layer_allocation
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count, select_pipeline_segment

from counterflow.errors import OptionError
from counterflow.megatron.checks import prepare_arguments
from counterflow.megatron.patterns import check_same_cut, cut_pattern, list_segments
from counterflow.megatron.v_layout.mirror import MirroredGroup
from counterflow.megatron.v_layout.segments import select_mirrored
from counterflow.options import Options
from counterflow.schedule import build, lay_v, to_csv


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def make_arguments(**given: Any) -> Namespace:
    """Arguments as Megatron parses them, of a run of two pipeline ranks."""
    base = {
        "rank": 0,
        "world_size": 4,
        "num_layers": None,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "num_virtual_stages_per_pipeline_rank": None,
        "untie_embeddings_and_output_weights": True,
    }
    return Namespace(**{**base, **given})


def prepare(schedule: str, pattern: str, **given: Any) -> Namespace:
    """Return the arguments after the checks."""
    args = make_arguments(hybrid_layer_pattern=pattern, **given)
    prepare_arguments(args, Options(schedule=schedule))
    return args


@pytest.mark.parametrize("pattern", ["*E*E*E*E", "*-|*E*|E/*E/*E", "E"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_cut_keeps_the_layers_and_its_segments_differ_by_one_at_most(pattern: str, stages: int) -> None:
    cut = cut_pattern(pattern, stages)
    lengths = [len(one) for one in list_segments(cut)]
    assert "".join(list_segments(cut)) == "".join(list_segments(pattern))
    assert cut.partition("/")[2] == pattern.partition("/")[2]
    assert len(lengths) == stages and sum(lengths) == get_hybrid_total_layer_count(pattern)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(
    ("schedule", "pattern", "layout"),
    [
        ("1f1b", "*E*|E", "straight 1"),
        ("interleaved", "*E|*E|*E|*E|*E|*E", "looped 3"),
        ("dualpipev", "*|E|*E|*E", "v 2"),
        ("dualpipe", "*|E|*E|*E/*E", "v 2"),
        ("auto", "*|E|*E|*E", "v 2"),
        ("dualpipev", "*E|*E|*E|", "v 2"),
    ],
)
def test_segments_are_the_stages(schedule: str, pattern: str, layout: str) -> None:
    args = prepare(schedule, pattern)
    assert args.hybrid_layer_pattern == pattern and args.cf_layout == layout
    assert args.num_virtual_stages_per_pipeline_rank is None, "Megatron refuses it beside a pattern"


@pytest.mark.parametrize(
    ("schedule", "cut"), [("gpipe", "*E*E|*E*E"), ("dualpipev", "*E|*E|*E|*E"), ("interleaved", "*E|*E|*E|*E")]
)
def test_a_pattern_without_a_cut_is_cut_evenly_and_rank_0_says_where(
    schedule: str, cut: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(schedule, "*E*E*E*E").hybrid_layer_pattern == cut
    assert f"cut evenly into the {cut.count('|') + 1} stages of --cf-schedule {schedule}, '{cut}'" in capsys.readouterr().out


def test_a_pattern_in_a_section_of_a_yaml_file_is_cut_there() -> None:
    section = SimpleNamespace(hybrid_layer_pattern="*E*E")
    args = make_arguments(language_model=section)
    prepare_arguments(args, Options(schedule="dualpipev"))
    assert section.hybrid_layer_pattern == "*|E|*|E" and args.cf_layout == "v 2"
    assert not hasattr(args, "hybrid_layer_pattern")


def test_megatron_cuts_a_pattern_whose_ends_are_to_be_shorter() -> None:
    assert prepare("1f1b", "*E*E*E", decoder_first_pipeline_num_layers=2).hybrid_layer_pattern == "*E*E*E"


def test_a_table_in_a_file_says_how_many_segments_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(to_csv(build("interleaved", 2, 8, vpp=3)))
    assert prepare(str(path), "*E*E*E").hybrid_layer_pattern == "*|E|*|E|*|E"
    with pytest.raises(OptionError, match=r"holds 3 model chunks on each of 2 pipeline ranks, so .* has 6 segments and"):
        prepare(str(path), "*E|*E|*E|*E")


@pytest.mark.parametrize(
    ("schedule", "pattern", "given", "said"),
    [
        ("dualpipev", "*E*E|*E*E", {}, "has 4 segments and '*E*E|*E*E' has 2: give for instance '*E|*E|*E|*E'"),
        ("1f1b", "*|E|*|E", {}, "holds 1 model chunk on each of 2 pipeline ranks, so --hybrid-layer-pattern has 2 segments"),
        ("interleaved", "*|E|*E", {}, "holds 2 or more model chunks on each of 2 pipeline ranks"),
        ("dualpipev", "*E|E", {}, "has 2: give 4 layers or more"),
        ("zbv", "*E*E*E", {}, "has 6 layers and no |, which cannot be cut evenly into 4 stages (2 on each of 2 pipeline ranks): "
         "give for instance '*E|*E|*|E'"),
        ("zbv", "*E*E", {"num_virtual_stages_per_pipeline_rank": 2},
         "--num-virtual-stages-per-pipeline-rank 2 given with --hybrid-layer-pattern '*E*E', whose segments (|) are the stages"),
        ("zbv", "*E*E", {"decoder_first_pipeline_num_layers": 1}, "to cut unevenly, give for instance '*|E|*|E'"),
        ("1f1b", "*E|xE", {}, "no layer of this Megatron-Core is 'x'; allowed are * + - D E G M (capitals, without blanks), |"),
        ("1f1b", "* e|*E", {}, "no layer of this Megatron-Core is ' ' or 'e'"),
        ("dualpipev", "|||", {}, "'|||' has no layers but those of prediction: give 4 layers or more"),
        ("dualpipev", "/*E/*E", {}, "'/*E/*E' has no layers but those of prediction"),
        ("1f1b", "//", {}, "'//' has no layers but those of prediction"),
        ("1f1b", "*E|*E/*E/E", {}, "All MTP patterns must be identical"),
        ("zbv", "*|E|*|E/*E", {"untie_embeddings_and_output_weights": False}, "--mtp-num-layers 1 with tied embeddings"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(schedule: str, pattern: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        prepare(schedule, pattern, **given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "pattern", "rank"),
    [("1f1b", "*-|*E", 0), ("interleaved", "*E|*-|*E|*-", 1), ("dualpipev", "*-|*E|*E|*-", 0), ("dualpipe", "*-|*E|*E|*-", 0)],
)
def test_a_rank_without_experts_is_refused_where_megatron_could_not_log(schedule: str, pattern: str, rank: int) -> None:
    logged = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
    prepare(schedule, pattern)
    prepare(schedule, pattern, **{**logged, "moe_aux_loss_coeff": 0.0})
    prepare(schedule, pattern.replace("-", "E"), **{**logged, "moe_z_loss_coeff": 1e-3})
    for given in (logged, {"moe_z_loss_coeff": 1e-3}):
        with pytest.raises(OptionError, match=f"pipeline rank {rank} holds .*no layer of experts"):
            prepare(schedule, pattern, **given)


def test_experts_of_a_prediction_layer_are_the_last_stages() -> None:
    prepare("dualpipev", "*-|*E|*E|*/*E", moe_z_loss_coeff=1e-3)


def test_clones_need_a_layer_of_experts() -> None:
    args = make_arguments(hybrid_layer_pattern="*-|*-", num_experts=4)
    with pytest.raises(OptionError, match="'.*' has none: drop it"):
        prepare_arguments(args, Options(eplb=True))


def test_state_that_fits_one_cut_is_not_loaded_under_another() -> None:
    one, same, other = (Namespace(hybrid_layer_pattern=pattern) for pattern in ("*E|*E", "*E|*E/*E", "*|E*E"))
    check_same_cut(one, same)
    check_same_cut(one, Namespace(hybrid_layer_pattern=None))
    with pytest.raises(OptionError, match="saved with --hybrid-layer-pattern"):
        check_same_cut(one, other)


class Group:
    """A pipeline group as seen by one of its ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_second_chunk_of_each_rank_gets_the_stage_of_a_v(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # It asks for process groups.
    monkeypatch.setattr(hybrid_layer_allocation, "log_on_each_pipeline_stage", lambda *args, **kwargs: None)
    segments = ["*" * (stage + 1) for stage in range(2 * ranks)]
    select = select_mirrored(select_pipeline_segment)
    for rank in range(ranks):
        layers, offset = select("|".join(segments), MirroredGroup(Group(rank, ranks)), 1)
        stage = lay_v(ranks).stages[rank][1]
        assert "".join(layers) == segments[stage]
        assert offset == sum(map(len, segments[:stage]))
