"""DeepSpeed's split backward passes of any module, and its overlapped pairs, beside plain DeepSpeed of the same script."""

import json
from itertools import batched
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.asked import list_asked, mark_nightly
from tests.support.comparing import TOLERANCE, assert_same_steps, find_difference
from tests.support.forked_ranks import run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "tests" / "distributed"
TOGETHER = 6
STEPS = 4
RECIPES = (None, "tensorwise", "blockwise", "delayed")
MICROBATCHES, REPLICAS = 4, 2
# Embedding and head, which are torch's, and six blocks, in which a layer of two linears leaves two gradients to a W.
WEIGHTS = 2 + 6 * 5
HALF: dict[str, Any] = {"bf16": {"enabled": True}}


# What of the grid is left to ``make nightly``.
NIGHTLY_ENGINES = (
    "None 1f1b",
    "tensorwise dualpipev",
    "tensorwise zbv",
    "blockwise dualpipev",
    "delayed dualpipev",
    "delayed 1f1b",
)
NIGHTLY_EXPERTS = ("interleaved", "bf16", "recomputed dualpipev")


def make_config(section: dict[str, Any] | None, stage: int = 1, **changes: Any) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROBATCHES,
        "steps_per_print": 1000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000},
        **changes,
    }
    return config if section is None else config | {"counterflow": section}


def make_engine_cases(steps: int, clip: float = 0.0) -> dict[str, Any]:
    """Return trainings of Transformer Engine's layers: each recipe, plain and under schedules.

    They are not clipped. A clipped gradient is multiplied by what comes of a sum over stages, whose last bit differs by layout
    and flips roundings to BF16.
    """
    cases: dict[str, Any] = {}
    for recipe in RECIPES:
        for schedule in (None, "dualpipev", "zbv", *(("1f1b",) if recipe in (None, "delayed") else ())):
            config = make_config({"schedule": schedule} if schedule else None, gradient_clipping=clip, **HALF)
            cases[f"{recipe} {schedule}"] = {"config": config, "recipe": recipe, "steps": steps, "seed": 11}
    zero = make_config({"schedule": "zbv"}, 0, gradient_clipping=clip, **HALF)
    cases["ZeRO-0 zbv"] = {"config": zero, "recipe": None, "steps": steps, "seed": 11}
    cases["ZeRO-0 None"] = {**cases["ZeRO-0 zbv"], "config": make_config(None, 0, gradient_clipping=clip, **HALF)}
    return cases


def make_expert_cases() -> dict[str, Any]:
    """Return trainings of AutoEP's layers: plain, under schedules, and with overlapped pairs."""
    sharded = {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "moe_layer_pattern": r"\d+\.mlp", "top_k": 2}
    recompute: dict[str, Any] = {"pipeline": {"activation_checkpoint_interval": 1, "use_reentrant": False}}
    cases: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": HALF, "recomputed": recompute}
    for kind, changes in kinds.items():
        paired: list[dict[str, Any]] = [
            {"schedule": schedule, "overlap": True} for schedule in ("dualpipev", "interleaved", "dualpipe")
        ]
        whole: list[dict[str, Any]] = [{"schedule": schedule} for schedule in ("dualpipev", "interleaved", "dualpipe", "zbv")]
        for section in [None, *paired, *whole] if kind == "fp32" else [None, paired[0], whole[0]]:
            name = "plain" if section is None else section["schedule"] + " in pairs" * ("overlap" in section)
            experts: dict[str, Any] = {"expert_parallel": {**sharded, "use_grouped_mm": False}}
            config = make_config(section, gradient_clipping=0.5, **changes, **experts)
            cases[f"{kind} {name}"] = {"config": config, "steps": STEPS, "seed": 1234, "stages": 2}
            if kind == "fp32" and name.startswith(("plain", "dualpipev")):
                cloned = config if section is None else config | {"counterflow": section | {"eplb": True}}
                cases[f"clones {name}"] = {**cases[f"{kind} {name}"], "config": cloned}
    return cases


def run_cases(script: str, cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the cases, a few in each set of ranks; return what each logged, and what ranks wrote ("said")."""
    done: dict[str, Any] = {}
    for number, names in enumerate(batched(cases, TOGETHER)):
        given, out = folder / f"cases-{number}.json", folder / f"out-{number}.json"
        given.write_text(json.dumps({name: cases[name] for name in names}))
        argument = [str(SCRIPTS / script), str(given), str(out)]
        said = run_ranks("launched_worker", argument, 4, folder / "logs" / str(number), trainer="deepspeed")
        done |= {name: {"name": name, "said": said, **run} for name, run in json.loads(out.read_text()).items()}
    return done


@pytest.fixture(scope="module")
def engine_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    asked = list_asked(request) | {f"{recipe} zbv" for recipe in list_asked(request, "recipe")}
    asked |= {f"{case.split()[0]} None" for case in asked}
    cases = {case: one for case, one in make_engine_cases(STEPS).items() if case in asked}
    return run_cases("deepspeed_engine_worker.py", cases, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def expert_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    asked = list_asked(request)
    asked |= {f"{case.split()[0]} plain" for case in asked} | {case.removesuffix(" in pairs") for case in asked}
    cases = {case: one for case, one in make_expert_cases().items() if case in asked | {"fp32 zbv"}}
    return run_cases("deepspeed_experts_worker.py", cases, tmp_path_factory.mktemp("experts"))


def is_engine_case_in_every_run(case: str) -> bool:
    return case not in NIGHTLY_ENGINES


def is_expert_case_in_every_run(case: str) -> bool:
    return not any(word in case for word in NIGHTLY_EXPERTS)


ENGINE_CASES = [name for name in make_engine_cases(STEPS) if not name.endswith("None")]


@pytest.mark.parametrize("case", mark_nightly(ENGINE_CASES, is_engine_case_in_every_run))
def test_transformer_engine_trains_as_in_plain_deepspeed(engine_runs: dict[str, Any], case: str) -> None:
    run, plain = engine_runs[case], engine_runs[f"{case.split()[0]} None"]
    assert find_difference(run, plain, "loss") == 0
    assert_same_steps(run, plain, 1e-6)
    assert plain["steps"][-1]["loss"] < plain["steps"][0]["loss"] - 0.5, "it learns nothing: equal losses say nothing"
    assert run["work"].get("weights") == plain["work"].get("weights"), "a weight is quantized at its first micro-batch"


@pytest.mark.parametrize("recipe", mark_nightly(map(str, RECIPES), lambda recipe: is_engine_case_in_every_run(f"{recipe} zbv")))
def test_its_weight_gradients_wait_for_the_w(engine_runs: dict[str, Any], recipe: str) -> None:
    run = engine_runs[f"{recipe} zbv"]
    assert run["work"]["left"] == STEPS * MICROBATCHES * REPLICAS * WEIGHTS
    assert "autograd graph" not in "".join(run["said"])


EXPERT_CASES = [name for name in make_expert_cases() if not name.endswith("plain")]


@pytest.mark.parametrize("case", mark_nightly(EXPERT_CASES, is_expert_case_in_every_run))
def test_autoep_trains_as_in_plain_deepspeed(expert_runs: dict[str, Any], case: str) -> None:
    tolerance = 1e-3 if case.startswith("bf16") else TOLERANCE
    assert_same_steps(expert_runs[case], expert_runs[f"{case.split()[0]} plain"], tolerance)


PAIRED = [name for name in EXPERT_CASES if name.endswith("in pairs")]


@pytest.mark.parametrize("case", mark_nightly(PAIRED, is_expert_case_in_every_run))
def test_overlapped_pairs_change_no_bit(expert_runs: dict[str, Any], case: str) -> None:
    run = expert_runs[case]
    assert find_difference(run, expert_runs[case.removesuffix(" in pairs")]) == 0
    # Tokens go to experts and back, and their numbers before; in a backward twice.
    line = next(line for line in "".join(run["said"]).splitlines() if "communications of a chunk's F and B" in line)
    assert "stage 1 6 and 4" in line


def test_experts_are_split_in_the_graph_and_the_log_says_so(expert_runs: dict[str, Any]) -> None:
    said = "".join(expert_runs["fp32 zbv"]["said"])
    assert "of the weights of stage 2 are split in the autograd graph: what its backward needs stays in memory" in said
