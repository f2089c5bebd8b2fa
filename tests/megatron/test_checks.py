"""What cannot work is refused before any process group is made, in one line that says what to change."""

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from counterflow.errors import OptionError
from counterflow.megatron.batches import Batch, list_batches
from counterflow.megatron.checks import check_loop, prepare_arguments
from counterflow.options import Options
from counterflow.schedule import ScheduleTable, build, build_forward_only, lay_bidirectional, lay_v, to_csv
from tests.support.running import refuses


def make_arguments(**given: Any) -> Namespace:
    """Arguments as Megatron parses them, of a run that every schedule accepts but for its chunks."""
    base = {
        "world_size": 4,
        "num_layers": 8,
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": None,
        "micro_batch_size": 1,
        "global_batch_size": 16,
        "rampup_batch_size": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "pipeline_model_parallel_layout": None,
        "untie_embeddings_and_output_weights": True,
        "mtp_num_layers": None,
        "cuda_graph_impl": "none",
        "ckpt_format": "torch_dist",
        "save": None,
        "load": None,
    }
    return Namespace(**{**base, **given})


@pytest.mark.parametrize(
    ("schedule", "given", "said"),
    [
        ("dualpipev", {"global_batch_size": 6}, "dualpipev: 3 micro-batches on 2 ranks given; it needs at least 4 micro-batches"),
        (
            "dualpipev",
            {"global_batch_size": None, "step_batch_size_schedule": "0:4 160:16", "train_iters": 50},
            "2 micro-batches on 2 ranks given; it needs at least 4 micro-batches (two per rank); this run has batches of 4 "
            "samples (2 micro-batches), then 16 samples (8 micro-batches): change --step-batch-size-schedule, --micro-batch-size",
        ),
        (
            "dualpipev",
            {"global_batch_size": None, "step_batch_size_schedule": "0:16 160:32 320:16", "train_iters": 50},
            "a batch of 32 samples is followed by one of 16, where Megatron-Core ends a run: give batch sizes that grow",
        ),
        (
            "interleaved",
            {
                "global_batch_size": None,
                "step_batch_size_schedule": "0:16 1K:18",
                "train_samples": 2000,
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            "a multiple of 2",
        ),
        (
            "dualpipe",
            {"global_batch_size": None, "step_batch_size_schedule": "0:4,40:16", "train_iters": 50},
            "at least 8 micro-batches (two per rank); it spans 2 replicas, each of 2 pipeline ranks and 2 micro-batches; "
            "this run has batches of 4 samples (2 micro-batches), then 16 samples (8 micro-batches): change --step-batch-size",
        ),
        (
            "auto",
            {"global_batch_size": None, "step_batch_size_schedule": "0:16 32:17", "train_iters": 50},
            "a batch of 17 samples does not divide into micro-batches of 1 on 2 data-parallel replicas",
        ),
        ("dualpipev", {"global_batch_size": 17}, "cannot cut these batches into micro-batches: global batch size (17)"),
        ("dualpipev", {"global_batch_size": 7, "decrease_batch_size_if_needed": True}, "3 micro-batches on 2 ranks given"),
        ("zbv", {"step_batch_size_schedule": "16"}, 'cannot cut these batches into micro-batches: Invalid schedule entry "16"'),
        ("zbv", {"step_batch_size_schedule": "5:16"}, "first schedule entry must have threshold 0, got 5"),
        (
            "dualpipev",
            {"tensor_parallel_num_weight_shards": 4},
            "4 ranks do not fit TP x CP x PP x weight shards = 1 x 1 x 2 x 4 = 8: start a multiple of 8 ranks",
        ),
        (
            "dualpipev",
            {"expert_tensor_parallel_num_weight_shards": 2},
            "4 ranks do not fit EP x ETP x PP x weight shards = 2 x 1 x 2 x 2 = 8",
        ),
        ("dualpipev", {"full_validation": True}, "of several model chunks per rank, does not run with --full-validation"),
        ("dualpipe", {"perform_rl_step": True}, "of several model chunks per rank, does not run with --perform-rl-step"),
        ("dualpipev", {"num_layers": 6}, "6 layers cannot be laid out on 4 stages"),
        ("dualpipev", {"num_layers": 6}, "multiple of 4 (4 or 8)"),
        (
            "1f1b",
            {"mtp_num_layers": 1, "untie_embeddings_and_output_weights": False},
            "add --untie-embeddings-and-output-weights",
        ),
        (
            "dualpipev",
            {"mtp_num_layers": 1, "pipeline_model_parallel_layout": "Ettt|tt|ttm|L"},
            "has an MTP layer (m) before the last stage, move it to the last",
        ),
        ("dualpipev", {"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration given, none is allowed"),
        ("dualpipev", {"num_virtual_stages_per_pipeline_rank": 4}, "4 chunks per rank given: set --num-virtual-stages"),
        ("dualpipev", {"num_layers_per_virtual_pipeline_stage": 1}, "(VPP 2), 4 chunks per rank given"),
        ("dualpipev", {"pipeline_model_parallel_layout": "Et|t|t|tL|t|t"}, "(VPP 2), 3 chunks per rank given"),
        (
            "dualpipev",
            {"pipeline_model_parallel_size": 1},
            "needs at least 2 pipeline ranks; --pipeline-model-parallel-size is 1",
        ),
        (
            "dualpipe",
            {"world_size": 6, "expert_model_parallel_size": 1, "global_batch_size": 12},
            "cross-links data-parallel replicas in pairs; this run has 3 (replicas of 2 ranks): start an even number",
        ),
        ("dualpipe", {"world_size": 2, "expert_model_parallel_size": 1}, "this run has 1 (replicas of 2 ranks)"),
        (
            "dualpipe",
            {"world_size": 8, "tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
            "this run has 1 (replicas of 8 ranks)",
        ),
        (
            "dualpipe",
            {"global_batch_size": 6},
            "dualpipe: 6 micro-batches on 4 ranks given; it needs an even number of ranks and of micro-batches, at least 8",
        ),
        ("dualpipe", {"pipeline_model_parallel_size": 1}, "needs at least 2 pipeline ranks"),
        ("dualpipe", {"num_virtual_stages_per_pipeline_rank": 4}, "(VPP 2), 4 chunks per rank given"),
        ("dualpipe", {"num_layers": 6}, "6 layers cannot be laid out on 4 stages"),
        ("dualpipe", {"dataloader_type": "external"}, "--dataloader-type external given, single and cyclic are allowed"),
        ("dualpipe", {"logits_load_dir": "x"}, "does not run with --logits-load-dir"),
        ("1f1b", {"pipeline_model_parallel_size": 1}, "needs at least 2 pipeline ranks"),
        ("1f1b", {"num_virtual_stages_per_pipeline_rank": 2}, "holds 1 model chunk per pipeline rank, 2 chunks per rank given"),
        ("interleaved", {}, "holds 2 or more model chunks per pipeline rank (VPP), none given"),
        ("interleaved", {"num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 10}, "a multiple of 2"),
        ("1f1b", {"world_size": 3}, "3 ranks do not fit TP x CP x PP = 1 x 1 x 2 = 2: start a multiple of 2 ranks"),
        ("1f1b", {"world_size": 6}, "6 ranks do not fit EP x ETP x PP = 2 x 1 x 2 = 4"),
        ("1f1b", {"use_megatron_fsdp": True}, "does not run with --use-megatron-fsdp"),
        ("1f1b", {"moe_expert_rank_capacity_factor": 1.5}, "does not run with --moe-expert-rank-capacity-factor in this version"),
        ("dualpipev", {"enable_mhc_connections": True}, "--cf-schedule dualpipev does not run with --enable-mhc-connections"),
        ("zb-h1", {"enable_hyper_connections": True}, "--cf-schedule zb-h1 does not run with --enable-hyper-connections"),
        ("zbv", {"logits_save_dir": "x"}, "--cf-schedule zbv does not run with --logits-save-dir"),
        ("dualpipev", {"ckpt_pg_tensors_cache_path": "x"}, "does not run with --ckpt-pg-tensors-cache-path"),
        ("dualpipev", {"save": "x", "ckpt_format": "torch"}, "--ckpt-format torch given, torch_dist is allowed"),
    ],
)
def test_refused(schedule: str, given: dict[str, Any], said: str) -> None:
    with refuses(said, OptionError):
        prepare_arguments(make_arguments(**given), Options(schedule=schedule))


@pytest.mark.parametrize("schedule", ["dualpipev", "dualpipe"])
def test_a_v_asks_for_its_two_chunks(schedule: str) -> None:
    args = make_arguments()
    prepare_arguments(args, Options(schedule=schedule))
    assert args.num_virtual_stages_per_pipeline_rank == 2


@pytest.mark.parametrize(
    "given",
    [
        {"untie_embeddings_and_output_weights": False},
        {"mtp_num_layers": 1},
        {"mtp_num_layers": 1, "pipeline_model_parallel_layout": "Ettt|tt|ttt|mL"},
    ],
)
def test_a_v_may_share_its_embedding(given: dict[str, Any]) -> None:
    prepare_arguments(make_arguments(**given), Options(schedule="dualpipev"))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipev", "dualpipe"])
def test_accepted(schedule: str) -> None:
    chunks = {"1f1b": None, "interleaved": 4, "dualpipev": 2, "dualpipe": 2}[schedule]
    prepare_arguments(make_arguments(num_virtual_stages_per_pipeline_rank=chunks), Options(schedule=schedule))


def test_an_uneven_split_is_left_to_the_flags_that_lay_it_out() -> None:
    prepare_arguments(make_arguments(num_layers=6, pipeline_model_parallel_layout="Et|tt|tt|tL"), Options(schedule="dualpipev"))


def test_without_a_schedule_nothing_is_checked_or_set() -> None:
    args = make_arguments(pipeline_model_parallel_size=1, world_size=3)
    before = vars(args).copy()
    prepare_arguments(args, Options())
    assert vars(args) == before


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("1f1b", "runs overlapped pairs F&B and 1f1b has none with 8 micro-batches on 2 ranks: choose interleaved, dualpipev"),
        ("zbv", "and zbv has none with 8 micro-batches"),
    ],
)
def test_overlap_without_pairs_is_refused(schedule: str, said: str) -> None:
    with refuses(said, OptionError):
        prepare_arguments(make_arguments(), Options(schedule=schedule, overlap=True))


def test_upstreams_flag_alone_points_to_ours() -> None:
    args = make_arguments(overlap_moe_expert_parallel_comm=True)
    with pytest.raises(OptionError, match="does not take --overlap-moe-expert-parallel-comm: give --cf-overlap in its place"):
        prepare_arguments(args, Options(schedule="dualpipev"))
    prepare_arguments(args, Options(schedule="dualpipev", overlap=True))
    assert args.overlap_moe_expert_parallel_comm is False, "Megatron refuses with it what its own plans cannot do"


@pytest.mark.parametrize("schedule", ["interleaved", "dualpipev", "auto"])
def test_pairs_take_what_megatrons_plans_cannot(schedule: str) -> None:
    several = {"num_virtual_stages_per_pipeline_rank": 2, "mtp_num_layers": 2, "moe_shared_expert_overlap": True}
    args = make_arguments(recompute_granularity="full", untie_embeddings_and_output_weights=True, **several)
    prepare_arguments(args, Options(schedule=schedule, overlap=True))


def test_the_world_size_of_the_launcher_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert list_batches(make_arguments(), ranks=2) == [Batch(16, 4)]


STEPS = "0:16, 4K:32 8K:64"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [(16, 8)]),
        ({"global_batch_size": None}, [(2, 1)]),
        # Ignored since 0.18.
        ({"rampup_batch_size": ["4", "4", "100"]}, [(16, 8)]),
        ({"global_batch_size": 19, "decrease_batch_size_if_needed": True}, [(18, 9)]),
        ({"step_batch_size_schedule": STEPS, "train_iters": 250}, [(16, 8)]),
        ({"step_batch_size_schedule": STEPS, "train_iters": 251}, [(16, 8), (32, 16)]),
        ({"step_batch_size_schedule": STEPS, "train_iters": 10**12}, [(16, 8), (32, 16), (64, 32)]),
        ({"step_batch_size_schedule": STEPS, "train_samples": 4000}, [(16, 8)]),
        ({"step_batch_size_schedule": STEPS, "train_samples": 4001}, [(16, 8), (32, 16)]),
        ({"step_batch_size_schedule": STEPS, "train_samples": 10**12}, [(16, 8), (32, 16), (64, 32)]),
        # Thresholds are tokens where a sample's length is known.
        ({"step_batch_size_schedule": STEPS, "train_samples": 100, "seq_length": 100}, [(16, 8), (32, 16), (64, 32)]),
        ({"step_batch_size_schedule": STEPS}, [(16, 8)]),
        ({"step_batch_size_schedule": "0:16 1K:16 2K:32", "train_iters": 1000}, [(16, 8), (32, 16)]),
        # What the run does not come to is no matter.
        ({"step_batch_size_schedule": "0:16 1K:3", "train_iters": 63}, [(16, 8)]),
        # Each of the data-parallel ranks that share a weight's shards has data of its own.
        ({"tensor_parallel_num_weight_shards": 2, "world_size": 8}, [(16, 4)]),
        ({"tensor_parallel_num_weight_shards": 4, "world_size": 16, "tensor_model_parallel_size": 2}, [(16, 4)]),
        ({"micro_batch_size": None}, []),
    ],
)
def test_every_batch_size_of_a_run_is_known(given: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    if "step_batch_size_schedule" in given:
        given = {"global_batch_size": None, **given}
    assert list_batches(make_arguments(**given), ranks=2) == [Batch(*one) for one in expected]


def test_batches_are_listed_from_where_a_run_goes_on() -> None:
    args = make_arguments(global_batch_size=None, step_batch_size_schedule=STEPS, train_iters=400)
    assert list_batches(args, 2, consumed=4000, iteration=250) == [Batch(32, 16), Batch(64, 32)]
    assert list_batches(args, 2, consumed=4000, iteration=300) == [Batch(32, 16)]
    assert list_batches(args, 2, consumed=10**9, iteration=300) == [Batch(64, 32)]


class Ramp:
    """As Megatron-Core 0.17's calculator: batches grow by an increment, evenly over so many samples."""

    def __init__(self, rampup: list[str], last: int, unit: int) -> None:
        self.first, self.increment, self.samples = map(int, rampup)
        self.last, self.unit = last, unit

    def update(self, consumed: int, _consistency_check: bool) -> None:
        steps = int(consumed / self.samples * (self.last - self.first) / self.increment)
        self.batch = min(self.first + steps * self.increment, self.last)

    def get(self) -> int:
        return self.batch // self.unit

    def get_current_global_batch_size(self) -> int:
        return self.batch

    get_current_running_global_batch_size = get_current_global_batch_size


def test_where_megatron_ramps_every_size_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(
        rank: int, rampup_batch_size: list[str], global_batch_size: int, micro_batch_size: int, data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
    ) -> Ramp:  # fmt: skip
        return Ramp(rampup_batch_size, global_batch_size, micro_batch_size * data_parallel_size)

    monkeypatch.setattr("megatron.core.num_microbatches_calculator._build_num_microbatches_calculator", build)
    ramped = make_arguments(global_batch_size=20, rampup_batch_size=["8", "4", "120"], train_samples=1000)
    assert [batch.samples for batch in list_batches(ramped, 2)] == [8, 12, 16, 20]
    assert [batch.samples for batch in list_batches(ramped, 2, consumed=50)] == [12, 16, 20]
    prepare_arguments(ramped, Options(schedule="dualpipev"))
    ramped.rampup_batch_size = ["4", "4", "120"]
    with pytest.raises(OptionError, match=r"2 micro-batches on 2 ranks given.* 4 samples \(2 micro-batches\), then 8 samples"):
        prepare_arguments(ramped, Options(schedule="dualpipev"))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "interleaved", "zbv", "dualpipev", "dualpipe", "auto"])
def test_batches_that_grow_are_accepted(schedule: str) -> None:
    args = make_arguments(
        global_batch_size=None, step_batch_size_schedule="0:16 1000:64", train_iters=500,
        num_virtual_stages_per_pipeline_rank=None if schedule in ("1f1b", "gpipe", "zb-h1") else 2,
    )  # fmt: skip
    prepare_arguments(args, Options(schedule=schedule))


def test_a_ramp_that_megatron_ignores_is_ignored() -> None:
    prepare_arguments(make_arguments(global_batch_size=12, rampup_batch_size=["2", "2", "1000"]), Options(schedule="dualpipev"))


@pytest.mark.parametrize("iterations", [60, 200])
def test_a_file_fits_one_batch_size(tmp_path: Path, iterations: int) -> None:
    path = tmp_path / "table.csv"
    path.write_text(to_csv(build("dualpipev", 2, 8)))
    args = make_arguments(global_batch_size=None, step_batch_size_schedule="0:16 1000:64", train_iters=iterations)
    said = (
        f"{path} is a table for one size, 8 micro-batches; this run has batches of 16 samples (8 micro-batches), then 64 samples "
        "(32 micro-batches): keep to one batch size, or choose a schedule by name"
    )
    with nullcontext() if iterations < 63 else refuses(said, OptionError):
        prepare_arguments(args, Options(schedule=str(path)))


def nest(name: str, **given: Any) -> Namespace:
    """Arguments of which one is nested, as Megatron's YAML files have it."""
    args = make_arguments(**given)
    args.model_parallel = SimpleNamespace(**{name: args.__dict__.pop(name)})
    return args


def test_nested_yaml_arguments_have_batches_too() -> None:
    args = nest("pipeline_model_parallel_size", global_batch_size=None, step_batch_size_schedule="0:4 160:16", train_iters=50)
    with pytest.raises(OptionError, match="batches of 4 samples \\(2 micro-batches\\)"):
        prepare_arguments(args, Options(schedule="dualpipev"))


def test_nested_yaml_arguments_are_checked_alike() -> None:
    args = nest("pipeline_model_parallel_size")
    del args.num_virtual_stages_per_pipeline_rank
    prepare_arguments(args, Options(schedule="dualpipev"))
    assert args.model_parallel.num_virtual_stages_per_pipeline_rank == 2


@pytest.mark.parametrize(
    ("table", "microbatches", "said"),
    [
        (
            to_csv(build("dualpipev", 4, 8)),
            8,
            "is a table for 4 pipeline ranks, 8 micro-batches and 2 chunks per rank; this run has 2, 8 and 2",
        ),
        (to_csv(build("dualpipev", 2, 4)), 8, "is a table for 2 pipeline ranks, 4 micro-batches"),
        ("not,a,table", 8, "line 1, cell 1: 'not' is not an action"),
        ("1F0\n2F0", 1, "are no layout of 2 ranks"),
        (
            to_csv(build("dualpipe", 2, 8)),
            8,
            "is a table for 2 pipeline ranks, 8 micro-batches and 2 chunks per rank; "
            "this run has 4, 16 and 2 (two replicas of 2 and 8)",
        ),
        ("0F0,1F1,1B1,0B0\n1F0,0F1,1B0,0B1", 1, "this run has 4, 2 and 2 (two replicas of 2 and 1)"),
        (
            to_csv(build("dualpipe", 4, 8)).replace("0I2,0W2,0I3,0W3", "0I2,0I3,0W2,0W3"),
            4,
            "ranks 0 and 3 are data-parallel peers and must run the same stages in the same order",
        ),
        (
            to_csv(build("dualpipe", 4, 8)).translate(str.maketrans("45", "54")),
            4,
            "rank 0: 3F5 is out of order; there each stage takes micro-batches 4, 5, 6, …",
        ),
        ("0F0,3F0,0B0,3B0\n1F0,2F0,1B0,2B0", 1, "rank 0, position 2, action 0B0: waits for ever for 1B0"),
        ("0F0,0F1,3F0,3B0,0B0\n1F0,2F0,2B0,1B0", 2, "rank 0: 3F1 is missing"),
        (
            to_csv(build_forward_only(lay_v(2), 8)),
            8,
            "table.csv cannot train: rank 0: 0B0 is missing; a table to train with has an F and either a B or an I with its W",
        ),
        (to_csv(build_forward_only(lay_bidirectional(4), 16)), 8, "table.csv cannot train: rank 0: 0B0 is missing"),
        ("0F1,0F0,3F1,3F0,3B1,3B0,0B1,0B0\n1F1,1F0,2F1,2F0,2B1,2B0,1B1,1B0", 2, "0F1 is out of order"),
    ],
)
def test_a_file_that_cannot_be_the_schedule_is_refused(tmp_path: Path, table: str, microbatches: int, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(table)
    with refuses(said):
        prepare_arguments(make_arguments(global_batch_size=2 * microbatches), Options(schedule=str(path)))


@pytest.mark.parametrize("table", [build("dualpipev", 2, 8), build("dualpipe", 4, 16)], ids=["dualpipev", "dualpipe"])
def test_a_file_of_the_right_size_is_accepted(tmp_path: Path, table: ScheduleTable) -> None:
    path = tmp_path / "table.csv"
    path.write_text(to_csv(table))
    prepare_arguments(make_arguments(), Options(schedule=str(path)))


def test_a_split_that_is_asked_for_must_be_had() -> None:
    # Layers of a spec of one's own need no Transformer Engine.
    engine = {"transformer_impl": "transformer_engine", "spec": ["counterflow.platform.hybrid_layers", "stack"]}
    prepare_arguments(make_arguments(**engine), Options(schedule="zbv"))
    with pytest.raises(
        OptionError, match="--cf-zero-bubble cannot split Transformer Engine's backward passes, no transformer-engine"
    ):
        prepare_arguments(make_arguments(**engine), Options(schedule="zbv", zero_bubble=True))
    prepare_arguments(make_arguments(transformer_impl="local"), Options(schedule="zbv", zero_bubble=True))


@pytest.mark.parametrize("chosen", [{}, {"zero_bubble": True}, {"zero_bubble": False}])
def test_fused_experts_of_transformer_engine_are_refused(chosen: dict[str, bool]) -> None:
    fused = {"transformer_impl": "transformer_engine", "use_transformer_engine_op_fuser": True}
    with pytest.raises(OptionError, match="--use-transformer-engine-op-fuser, whose fused experts keep theirs"):
        prepare_arguments(make_arguments(**fused), Options(schedule="zbv", **chosen))


MODEL = {"num_experts": 8, "rank": 0}
# On four ranks in two pipeline ranks, eight experts on two ranks.
SHARDED_WEIGHTS = [
    ({"tensor_parallel_num_weight_shards": 2}, "--tensor-parallel-num-weight-shards 2 on 1 tensor-parallel rank in"),
    ({"expert_tensor_parallel_num_weight_shards": 2}, "--expert-tensor-parallel-num-weight-shards 2 on 1 expert-tensor-parallel"),
    (
        {"tensor_model_parallel_size": 2, "tensor_parallel_num_weight_shards": 4},
        "--tensor-parallel-num-weight-shards 4 on 2 tensor-parallel ranks in",
    ),
    (
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_tensor_parallel_num_weight_shards": 2},
        "--expert-tensor-parallel-num-weight-shards 2 on 1 expert-tensor-parallel rank in",
    ),
    # What a model's config says of it, in a loop without megatron.training.
    ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards 2 on 1 tensor-parallel rank in"),
    ({"expert_gtp_weight_remat_size": 4}, "--expert-tensor-parallel-num-weight-shards 4 on 1 expert-tensor-parallel rank in"),
]


@pytest.mark.parametrize(("given", "said"), SHARDED_WEIGHTS)
@pytest.mark.parametrize("ours", [{"schedule": "dualpipev"}, {"schedule": "1f1b"}, {"eplb": True}])
def test_weights_cut_further_than_their_tensors_are_refused(ours: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as raised:
        prepare_arguments(make_arguments(**MODEL, **{"world_size": 16, **given}), Options(**ours))
    assert said in str(raised.value)
    assert str(raised.value).startswith("--cf-eplb does not run" if "eplb" in ours else "--cf-schedule")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_as_many_weight_shards_as_tensor_parallel_ranks_are_none(ranks: int) -> None:
    shards = {"tensor_parallel_num_weight_shards": ranks, "expert_tensor_parallel_num_weight_shards": ranks}
    args = make_arguments(**MODEL, tensor_model_parallel_size=ranks, expert_tensor_parallel_size=ranks, world_size=8, **shards)
    prepare_arguments(args, Options(schedule="dualpipev", eplb=True))


class Chunk:
    """A model's chunk, of which only its config is looked at."""

    def __init__(self, **given: Any) -> None:
        sizes = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "pipeline_model_parallel_size": 2}
        chunks = {"virtual_pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
        self.config = TransformerConfig(**sizes, **chunks)
        for name, value in given.items():
            setattr(self.config, name, value)


def test_in_a_loop_of_its_own_nothing_is_said_of_switches_that_nobody_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    chunk = Chunk()
    assert chunk.config.overlap_p2p_comm is False, "as every config has it"
    check_loop([chunk, chunk], Options(schedule="dualpipev"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"moe_expert_rank_capacity_factor": 1.0}, "does not run with --moe-expert-rank-capacity-factor"),
        ({"enable_mhc_connections": True}, "does not run with --enable-mhc-connections"),
        ({"gtp_weight_remat_size": 2}, "does not run with --tensor-parallel-num-weight-shards 2"),
    ],
)
def test_in_a_loop_of_its_own_the_models_config_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(OptionError, match=said):
        check_loop([Chunk(**given)] * 2, Options(schedule="dualpipev"))


@pytest.mark.parametrize(
    ("schedule", "given", "left", "said"),
    [
        ("dualpipev", {"overlap_p2p_comm": False}, {"overlap_p2p_comm": True}, "--no-overlap-p2p-communication"),
        ("interleaved", {"overlap_p2p_comm": False}, {"overlap_p2p_comm": True}, "--no-overlap-p2p-communication"),
        ("1f1b", {"overlap_p2p_comm": False}, {"overlap_p2p_comm": False}, ""),
        ("dualpipev", {"overlap_p2p_comm": True}, {"overlap_p2p_comm": True}, ""),
        (
            "zbv",
            {"overlap_p2p_comm": False, "overlap_p2p_comm_warmup_flush": True},
            {"overlap_p2p_comm": True, "overlap_p2p_comm_warmup_flush": False},
            "--no-overlap-p2p-communication and --overlap-p2p-communication-warmup-flush",
        ),
        (
            "zb-h1",
            {"overlap_p2p_comm_warmup_flush": True},
            {"overlap_p2p_comm_warmup_flush": False},
            "--overlap-p2p-communication-warmup-flush",
        ),
        (
            "dualpipe",
            {"microbatch_group_size_per_vp_stage": 3},
            {"microbatch_group_size_per_vp_stage": 3},
            "--microbatch-group-size-per-virtual-pipeline-stage",
        ),
        ("interleaved", {"microbatch_group_size_per_vp_stage": 2}, {"microbatch_group_size_per_vp_stage": 2}, ""),
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_switches_of_megatrons_own_transfers_are_ignored_and_said_once(
    schedule: str, given: dict[str, Any], left: dict[str, Any], said: str, is_nested: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = None if schedule in ("1f1b", "zb-h1") else 2
    for rank in (0, 1):
        args = make_arguments(num_virtual_stages_per_pipeline_rank=chunks, rank=rank, **({} if is_nested else given))
        if is_nested:
            args.model_parallel = SimpleNamespace(**given)
        prepare_arguments(args, Options(schedule=schedule))
        assert left.items() <= vars(args.model_parallel if is_nested else args).items()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (1 if said and rank == 0 else 0)
        assert not lines or lines[0].startswith(f"counterflow: {said} ignored under --cf-schedule {schedule}: it moves tensors")


@pytest.mark.parametrize(
    ("clones", "given", "said"),
    [
        (1, {"num_experts": None}, "--num-experts is not given: drop it"),
        (1, {"num_experts": 7}, "7 experts (--num-experts) do not divide by --expert-model-parallel-size 2"),
        (
            5,
            {},
            "--cf-eplb-clones-per-rank 5 given; each rank is home to 4 of 8 experts, so 4 at most can be cloned on it: "
            "give 4 or less",
        ),
        (7, {"expert_model_parallel_size": 4}, "so 6 at most can be cloned on it"),
        (1, {"moe_expert_capacity_factor": 1.0}, "does not run with --moe-expert-capacity-factor 1.0"),
        (1, {"moe_expert_capacity_factor": 0.0}, "does not run with --moe-expert-capacity-factor 0.0"),
        (1, {"moe_pad_expert_input_to_capacity": True}, "does not run with --moe-pad-expert-input-to-capacity"),
        (1, {"moe_token_dispatcher_type": "pigeon"}, "--moe-token-dispatcher-type pigeon: alltoall, allgather and flex are"),
        (1, {"moe_use_upcycling": True}, "does not run with --moe-use-upcycling"),
        (
            1,
            {"fp8_param_gather": True},
            "does not run with --fp8-param-gather (in FP8 without it, clones already receive FP8 weights) in this",
        ),
        (1, {"use_megatron_fsdp": True}, "does not run with --use-megatron-fsdp"),
        (1, {"moe_expert_rank_capacity_factor": 2.0}, "does not run with --moe-expert-rank-capacity-factor in this version"),
        (1, {"moe_single_grouped_weight": True}, "--cf-eplb does not run with --moe-single-grouped-weight in this version"),
        (1, {"moe_single_grouped_bias": True}, "--cf-eplb does not run with --moe-single-grouped-bias"),
        (1, {"cuda_graph_impl": "local"}, "--cuda-graph-impl local given, none is allowed"),
    ],
)
@pytest.mark.parametrize("schedule", [None, "1f1b"])
def test_what_cannot_be_balanced_is_refused(schedule: str | None, clones: int, given: dict[str, Any], said: str) -> None:
    options = Options(schedule=schedule, eplb=True, eplb_clones_per_rank=clones)
    with refuses(said, OptionError):
        prepare_arguments(make_arguments(**{**MODEL, **given}), options)


def test_a_router_that_is_forced_is_not_measured_beside_one() -> None:
    options = Options(eplb=True, eplb_measure_forced=100)
    prepare_arguments(make_arguments(**MODEL), options)
    with refuses("--cf-eplb-measure-forced 100 measures beside a router that chooses, and --moe-router-force-load", OptionError):
        prepare_arguments(make_arguments(**MODEL, moe_router_force_load_balancing=True), options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, "with --fp8-format e4m3 and without --moe-grouped-gemm: "),
        ({"fp4": "e2m1"}, "with --fp4-format e2m1: clones in shared slots do not compute in FP4 in this version: "),
    ],
)
@pytest.mark.parametrize("shared", [{"eplb_plan": "exact"}, {"eplb_buffers": "shared"}])
def test_shared_slots_are_refused_numbers_that_they_cannot_hold(shared: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with refuses(said, OptionError):
        prepare_arguments(make_arguments(**MODEL, **given), Options(eplb=True, **shared))


@pytest.mark.parametrize("given", [{}, {"moe_token_dispatcher_type": "allgather"}, {"expert_model_parallel_size": 4}])
def test_as_many_clones_as_other_ranks_have_experts_are_accepted(given: dict[str, Any]) -> None:
    args = make_arguments(**{**MODEL, **given})
    options = Options(eplb=True, eplb_clones_per_rank=8 - 8 // args.expert_model_parallel_size)
    prepare_arguments(args, options)


def test_balancing_alone_may_record(tmp_path: Path) -> None:
    prepare_arguments(make_arguments(**MODEL), Options(eplb=True, record=tmp_path))


def test_nested_yaml_arguments_are_balanced_alike() -> None:
    args = nest("expert_model_parallel_size", **MODEL)
    options = Options(eplb=True, eplb_clones_per_rank=5)
    with pytest.raises(OptionError, match="so 4 at most can be cloned on it"):
        prepare_arguments(args, options)
    prepare_arguments(args, Options(eplb=True))


def test_experts_are_found_where_they_are_named() -> None:
    options = Options(eplb=True)
    args = make_arguments()
    with pytest.raises(OptionError, match="--num-experts is not given"):
        prepare_arguments(args, options)
    args.language_model = SimpleNamespace(num_moe_experts=4)
    prepare_arguments(args, options)
    args.language_model.num_moe_experts = 5
    with pytest.raises(OptionError, match="5 experts .* do not divide by"):
        prepare_arguments(args, options)
    # The checkpoint says how many there are, later.
    prepare_arguments(make_arguments(use_checkpoint_args=True), options)


def test_counts_of_tokens_that_clones_would_falsify_are_refused() -> None:
    with pytest.raises(OptionError, match="--cf-eplb does not run with --save-tokens-per-expert-interval"):
        prepare_arguments(make_arguments(num_experts=4, save_tokens_per_expert_interval=1), Options(eplb=True))
