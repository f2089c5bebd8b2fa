"""DeepSpeed under a schedule, by one key of its JSON, beside plain DeepSpeed of the same script."""

import json
from itertools import batched
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.asked import list_asked, mark_nightly
from tests.support.comparing import assert_same_steps
from tests.support.forked_ranks import RanksError, run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

TABLE, LINKED = (str(ROOT / "tests" / "data" / f"{name}.csv") for name in ("dualpipev-2-4", "dualpipe-4-8"))
SCHEDULES = ["1f1b", "gpipe", "interleaved", "zb-h1", "zbv", "dualpipev", "dualpipe", TABLE, LINKED]
SEEDS = (11, 1234)
STEPS = 6
TOGETHER = 4


# By kind of case, the schedules under which it runs in every ``make test``: each family, kind of model and feature. Kinds that
# are not named run under all, at the first seed; the rest of the grid is for ``make nightly``.
EVERY_TIME = {
    "tuple": ("zbv",), "tied": ("interleaved", "dualpipev"), "fp16": ("zbv",), "fp16-zero-0": ("1f1b",), "mixed": ("zb-h1",),
    "overlap-comm": ("zbv",), "shapes": ("dualpipev",), "cut": ("dualpipe",), "tied-bf16": ("dualpipe",), "loader": ("dualpipe",),
    "groups": ("dualpipev",), "recompute": ("1f1b",), "reentrant": ("dualpipev",), "slices": ("dualpipev",), "v": ("dualpipev",),
    "bf16": ("dualpipev",), "bf16-zero-0": ("dualpipe",), "deep": ("zbv",), "tied-one": ("zbv",), "floats-one": ("dualpipev",),
}  # fmt: skip
SECOND_SEED = ("zbv", "dualpipe")


def is_in_every_run(case: str) -> bool:
    """Tell whether a case is not left to ``make nightly``."""
    what, schedule, seed = case.split()
    if what == "dense" and int(seed) == SEEDS[1]:
        return schedule in SECOND_SEED
    return schedule in EVERY_TIME.get(what, schedule)


def make_case(model: str, schedule: str | None, seed: int, **changes: Any) -> dict[str, Any]:
    """Return a case of `deepspeed_worker.train`: fp32, ZeRO-1 and clipped gradients, but for ``changes`` of the config."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "steps_per_print": 1000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": make_zero(1),
        **changes,
    }
    if schedule is not None:
        config["counterflow"] = {"schedule": schedule}
    return {"model": model, "config": config, "steps": STEPS, "seed": seed}


def make_zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000, **more}


def make_cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for schedule in (None, *SCHEDULES):
        for seed in SEEDS:
            cases[name("dense", schedule, seed)] = make_case("dense", schedule, seed)
    for model in ("tuple", "tied"):
        for schedule in (None, "interleaved", "zbv", "dualpipev", "dualpipe"):
            cases[name(model, schedule, SEEDS[0])] = make_case(model, schedule, SEEDS[0])
    # Two steps are skipped, until the scale fits.
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 19, "loss_scale_window": 3, "hysteresis": 1}}
    for schedule in (None, "zbv", "1f1b"):
        cases[name("fp16", schedule, 0)] = make_case("dense", schedule, SEEDS[0], **fp16)
        cases[name("fp16-zero-0", schedule, 0)] = make_case("dense", schedule, SEEDS[0], zero_optimization=make_zero(0), **fp16)
    for schedule in (None, "zb-h1", "zbv"):
        cases[name("mixed", schedule, 0)] = make_case("mixed", schedule, SEEDS[1])
        # DeepSpeed itself says that it switches the first off in a pipeline.
        zero = make_zero(1, overlap_comm=True, contiguous_gradients=True)
        cases[name("overlap-comm", schedule, 0)] = make_case("tied", schedule, SEEDS[1], zero_optimization=zero)
    for schedule in (None, "interleaved", "dualpipev", "dualpipe"):
        cases[name("cut", schedule, 0)] = make_case("dense", schedule, SEEDS[0]) | {"has_cut": True}
        cases[name("shapes", schedule, 0)] = make_case("shapes", schedule, SEEDS[0])
        # Two uses of one parameter on one rank are one sum there, and two sums that are added in plain DeepSpeed: equal in fp32.
        # So are those of cross-linked replicas if they are reduced in fp32 too.
        sums = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        cases[name("tied-bf16", schedule, 0)] = make_case("tied", schedule, SEEDS[1], **sums)
    for schedule in (None, "1f1b", "dualpipev", "dualpipe"):
        # In a pipeline plain DeepSpeed ends with "timer has already been started".
        timed: dict[str, Any] = {"wall_clock_breakdown": True, "steps_per_print": 4} if schedule else {}
        cases[name("loader", schedule, 0)] = make_case("dense", schedule, SEEDS[0], **timed) | {"has_loader": True}
        mixed = {"zero_allow_untested_optimizer": True}
        cases[name("groups", schedule, 0)] = make_case("dense", schedule, SEEDS[0], **mixed) | {"has_groups": True}
        # Where recomputation is reentrant, plain DeepSpeed does not recompute what takes integers.
        for what, layers in (("recompute", None), ("reentrant", ["Block"])):
            recompute = {"pipeline": {"activation_checkpoint_interval": 1, "use_reentrant": layers is not None}}
            cases[name(what, schedule, 0)] = make_case("dense", schedule, SEEDS[0], **recompute) | {"recomputed": layers}
        # Plain DeepSpeed sends a part of each message from every slice.
        parts = {"pipeline": {"pipe_partitioned": True, "grad_partitioned": True}}
        if schedule != "dualpipe":
            cases[name("slices", schedule, 0)] = make_case("dense", schedule, SEEDS[0], **parts) | {"slices": 2}
        cases[name("v", schedule, 0)] = make_case("tied", schedule, SEEDS[0]) | {"is_v": True}
        bf16 = {"bf16": {"enabled": True}}
        cases[name("bf16", schedule, 1)] = make_case("dense", schedule, SEEDS[0], **bf16)
        cases[name("bf16-zero-0", schedule, 0)] = make_case("dense", schedule, SEEDS[0], zero_optimization=make_zero(0), **bf16)
    for schedule in (None, "zbv", "interleaved"):
        cases[name("deep", schedule, 4)] = make_case("dense", schedule, SEEDS[1]) | {"stages": 4}
    for model in ("dense", "tied", "floats"):
        # The reference computes on one rank all that the pipeline's four compute: half the micro-batches on twice the replicas.
        one = {"stages": 1, "is_seeded": True}
        cases[name(f"{model}-one", None, 0)] = make_case(model, None, SEEDS[0], gradient_accumulation_steps=2) | one
        # fp32 at ZeRO-0 clips by another norm in plain DeepSpeed's pipeline.
        zero = make_case(model, "zbv", SEEDS[0], zero_optimization=make_zero(0)) | {"is_seeded": True}
        cases[name(f"{model}-one", "zbv", 0)] = zero
        cases[name(f"{model}-one", "dualpipev", 0)] = make_case(model, "dualpipev", SEEDS[0]) | {"is_seeded": True}
    return cases


def name(what: str, schedule: str | None, seed: int) -> str:
    return f"{what} {'plain' if schedule is None else Path(schedule).stem} {seed}"


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    asked = list_asked(request)
    asked |= {find_plain(case) for case in asked}
    return run_cases({case: one for case, one in make_cases().items() if case in asked}, tmp_path_factory.mktemp("deepspeed"))


def find_plain(case: str) -> str:
    """Return the case of plain DeepSpeed that a case is compared with."""
    what, _, seed = case.split()
    return name(what, None, int(seed))


def run_cases(cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the cases in order, a few in each set of ranks: threads of the groups that DeepSpeed makes stay until a rank ends."""
    done: dict[str, Any] = {}
    for number, names in enumerate(batched(cases, TOGETHER)):
        given, out = folder / f"cases-{number}.json", folder / f"out-{number}.json"
        given.write_text(json.dumps({name: cases[name] for name in names}))
        run_ranks("deepspeed_worker", [str(given), str(out)], 4, folder / "logs" / str(number), trainer="deepspeed")
        done |= json.loads(out.read_text())
    return {case: {"name": case, **run} for case, run in done.items()}


def read_line(folder: Path) -> str:
    """Return the line that the plugin wrote on rank 0 of the first set of ranks, the only one."""
    written = (folder / "logs" / "0" / "0" / "stderr.log").read_text()
    (line,) = [line for line in written.splitlines() if line.startswith("counterflow: ")]
    return line


@pytest.mark.parametrize("case", mark_nightly((case for case in make_cases() if " plain " not in case), is_in_every_run))
def test_steps_are_those_of_plain_deepspeed(trained: dict[str, Any], case: str) -> None:
    what, plain = case.split()[0], trained[find_plain(case)]
    assert_same_steps(trained[case], plain)
    if "-one" not in what:
        for mine, theirs in zip(trained[case]["replicas"], plain["replicas"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4), "a replica's own losses and logits"
    assert plain["steps"][STEPS - 1]["loss"] < plain["steps"][0]["loss"] - 0.1, (
        "the model learns nothing: equal losses say nothing"
    )
    assert any(step["skipped"] for step in plain["steps"]) == (what == "fp16"), "a scale that is too large skips steps, no other"


@pytest.mark.parametrize(
    ("changes", "section", "words"),
    [
        pytest.param(
            {"zero_optimization": {"stage": 2}}, {"schedule": "zbv"}, "zero_optimization.stage 2 does not run in a pipeline",
            marks=pytest.mark.nightly,
        ),
        ({"gradient_accumulation_steps": 3}, {"schedule": "dualpipev"}, "3 micro-batches"),
        ({}, {"schedule": "interleaved", "vpp": 5}, "cuts a model into 10 stages on 2 ranks and the PipelineModule has 8 layers"),
        pytest.param({"gradient_accumulation_steps": 1}, {"schedule": "dualpipe"}, "2 micro-batches", marks=pytest.mark.nightly),
        ({}, {"schedule": "dualpipev", "zero_buble": True}, "did you mean zero_bubble?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(
    changes: dict[str, Any], section: dict[str, Any], words: str, tmp_path: Path
) -> None:
    case = make_case("dense", None, 1, **changes, counterflow=section)
    with pytest.raises(RanksError):
        run_cases({"bad": case}, tmp_path)
    line = read_line(tmp_path)
    assert words in line
    assert "--cf-" not in line, "a JSON has no flags"


def test_shapes_that_change_need_dynamic_shape(tmp_path: Path) -> None:
    # Samples 0 to 3 make the first two micro-batches of each replica; those of the next have another length.
    with pytest.raises(RanksError):
        run_cases({"bad": make_case("changing", "dualpipev", 1)}, tmp_path)
    written = [path.read_text() for path in (tmp_path / "logs" / "0").glob("*/stderr.log")]
    words = (
        "(2, 11, 16) torch.float32 for micro-batch 1 and (2, 12, 16) torch.float32 before: make the PipelineModule with dynamic"
    )
    assert any(words in text for text in written), written


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_cases(make_resumptions(folder), folder) | {"folder": folder}


def make_resumptions(folder: Path) -> dict[str, Any]:
    """Return runs of half the steps that save, and runs of the other half that load: "saver, loader"."""
    plain, other = str(folder / "plain"), str(folder / "zbv")
    half, seed = {"steps": STEPS // 2}, SEEDS[0]
    cases = {"whole": make_case("tied", None, seed)}
    cases["plain"] = make_case("tied", None, seed) | half | {"save": plain}
    cases["zbv"] = make_case("tied", "zbv", seed) | half | {"save": other}
    # Another seed: what is not loaded is not alike by chance.
    for same, where in (("1f1b", plain), ("gpipe", plain), ("dualpipev", other)):
        cases[f"{same} resumes"] = make_case("tied", same, seed + 1) | {"load": {"load_dir": where}}
    layouts: tuple[tuple[str | None, str], ...] = (("dualpipev", plain), ("interleaved", other), (None, other))
    for schedule, where in layouts:
        weights = {"load_dir": where, "load_module_only": True}
        cases[f"weights {schedule}"] = make_case("tied", schedule, seed + 1) | {"load": weights, "steps": 0}
    return cases


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "dualpipev"])
def test_training_resumes_where_the_layout_is_the_same(resumed: dict[str, Any], schedule: str) -> None:
    run = resumed[f"{schedule} resumes"]
    assert [step["iteration"] for step in run["steps"]] == list(range(STEPS // 2 + 1, STEPS + 2))
    assert_same_steps(run, resumed["whole"])


@pytest.mark.parametrize("schedule", ["dualpipev", "interleaved", None])
def test_weights_load_under_every_layout(resumed: dict[str, Any], schedule: str | None) -> None:
    (evaluation,) = resumed[f"weights {schedule}"]["steps"]
    assert evaluation["loss"] == pytest.approx(resumed["plain"]["steps"][-1]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "saver"),
    [("dualpipev", "plain"), (None, "zbv"), pytest.param("1f1b", "zbv", marks=pytest.mark.nightly)],
)
def test_optimizer_states_of_another_layout_are_refused(
    resumed: dict[str, Any], schedule: str | None, saver: str, tmp_path: Path
) -> None:
    case = make_case("tied", schedule, 1) | {"load": {"load_dir": str(resumed["folder"] / saver)}}
    with pytest.raises(RanksError):
        run_cases({"bad": case}, tmp_path)
    assert "load_optimizer_states=False" in read_line(tmp_path)
