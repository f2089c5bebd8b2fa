"""Balanced experts in DeepSpeed: a model whose MoE layers AutoEP has replaced, beside plain DeepSpeed of the same script."""

import csv
import json
import re
from itertools import batched
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.balance.files.recorded import read_record
from tests.support.asked import list_asked, mark_nightly
from tests.support.comparing import HALF_TOLERANCE, assert_same_steps
from tests.support.forked_ranks import RanksError, run_ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

STEPS, SHORT = 8, 4
# What of the grid is left to ``make nightly``.
NIGHTLY = (
    "seed 1234, dualpipev", "seed 11, plain pipeline", "reentrant, clones", "ZeRO-0, clones", "dense, pipeline",
    "seed 11, homes move at ZeRO-0", "recompute, just in time",
)  # fmt: skip
SEEDS = (11, 1234)
TOGETHER = 5
PIPELINE = {"stages": 2, "gas": 4}
BF16 = {"bf16": {"enabled": True}}
JUST_IN_TIME: dict[str, Any] = {"plan": "exact"}


def make_case(
    key: dict[str, Any] | None = None, *, seed: int = SEEDS[0], steps: int = SHORT, gas: int = 2, ep: int = 2, zero: int = 1,
    overlap_comm: bool = False, changes: dict[str, Any] | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return a case of `deepspeed_experts_worker.train`; ``key`` is the plugin's, None for plain DeepSpeed."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 0.5,
        "steps_per_print": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "zero_optimization": {"stage": zero, "reduce_bucket_size": 20_000, "overlap_comm": overlap_comm},
        "expert_parallel": {
            "enabled": True, "autoep_size": ep, "preset_model": "mixtral", "moe_layer_pattern": r"\d+\.mlp", "top_k": 2,
            "use_grouped_mm": False,
        },
        **(changes or {}),
    }  # fmt: skip
    if key is not None:
        config["counterflow"] = key
    return {"config": config, "steps": steps, "seed": seed, **more}


def clone(schedule: str | None = None, **eplb: Any) -> dict[str, Any]:
    """Return a key that clones experts, with a schedule if one is given."""
    key: dict[str, Any] = {"eplb": {"clones_per_rank": 2, **eplb}}
    return key if schedule is None else key | {"schedule": schedule}


def run_cases(cases: dict[str, Any], folder: Path, *, scatter: bool = True) -> dict[str, Any]:
    """Run the cases in order, a few in each set of ranks; ``scatter``: every step has another placement, which is drawn."""
    done: dict[str, Any] = {}
    # A run with a pipeline leaves global state, with which DeepSpeed cannot run without one.
    for stages in (0, 2):
        names = [name for name, case in cases.items() if case.get("stages", 0) == stages]
        for number, some in enumerate(batched(names, TOGETHER)):
            given, out = (folder / f"{what}-{stages}-{number}.json" for what in ("cases", "out"))
            given.write_text(json.dumps({name: cases[name] for name in some}))
            argument = [str(given), str(out), *(["scatter"] if scatter else [])]
            run_ranks("deepspeed_experts_worker", argument, 4, folder / "logs" / f"{stages}-{number}", trainer="deepspeed")
            done |= json.loads(out.read_text())
    return {name: {"name": name, **run} for name, run in done.items()}


def make_cases(folder: Path) -> dict[str, Any]:
    """Return runs by name, "what, variant": each is compared with "what, plain"."""
    cases = {}
    for seed in SEEDS:
        long = {"seed": seed, "steps": STEPS}
        cases[f"seed {seed}, plain"] = make_case(**long, evaluate_at=3)
        cases[f"seed {seed}, clones"] = make_case(clone() | {"record": str(folder / f"clones-{seed}")}, **long, evaluate_at=3)
        cases[f"seed {seed}, dualpipev"] = make_case(clone("dualpipev"), **long, **PIPELINE)
    cases["seed 11, plain pipeline"] = make_case(**PIPELINE, steps=STEPS)
    cases["seed 11, 1f1b"] = make_case(clone("1f1b", split="even"), **PIPELINE, steps=STEPS)
    cases["seed 11, pipeline"] = make_case(clone(), **PIPELINE, steps=STEPS)
    record = {"record": str(folder / "homes")}
    cases["seed 11, homes move"] = make_case(clone(rehome_interval=2) | record, steps=STEPS)
    cases["seed 11, homes move at ZeRO-0"] = make_case(clone("dualpipev", rehome_interval=1), **PIPELINE, zero=0, steps=STEPS)
    cases["seed 11, just in time"] = make_case(clone(**JUST_IN_TIME), steps=STEPS, evaluate_at=3)
    cases["seed 1234, just in time, pairs"] = make_case(
        clone("dualpipev", **JUST_IN_TIME) | {"overlap": True}, seed=1234, steps=STEPS, **PIPELINE
    )
    cases["seed 11, just in time, split"] = make_case(clone("zb-h1", **JUST_IN_TIME), steps=STEPS, **PIPELINE)
    cases["recompute, just in time"] = make_case(clone(**JUST_IN_TIME), recompute=False)
    cases["reentrant, just in time"] = make_case(clone(**JUST_IN_TIME), recompute=True)
    cases["EP 4, both kinds"] = make_case(clone(plan="auto", backward="keep"), ep=4)
    for what, more in {
        "ZeRO-2": {"zero": 2},
        "overlapped reductions": {"overlap_comm": True},
        "EP 4": {"ep": 4},
        "recompute": {"recompute": False},
        "reentrant": {"recompute": True},
    }.items():
        cases[f"{what}, plain"] = make_case(**more)
        cases[f"{what}, clones"] = make_case(clone() | {"record": str(folder / what)}, **more)
    cases["ZeRO-0, plain"] = make_case(zero=0)
    cases["ZeRO-0, clones"] = make_case(clone(), zero=0)
    # So many tokens that it pays to move an expert.
    large: dict[str, Any] = {"gas": 4, "steps": 8, "changes": {"train_micro_batch_size_per_gpu": 32}}
    cases["homes alone, plain"] = make_case(**large)
    cases["homes alone, auto"] = make_case({"eplb": {"clones_per_rank": 0}, "record": str(folder / "alone")}, **large)
    # Plain DeepSpeed has no pipeline of these.
    cases["dense, plain"] = make_case(dense=4)
    cases["dense, 1f1b"] = make_case(clone("1f1b"), **PIPELINE, dense=4)
    cases["dense, pipeline"] = make_case(clone(), **PIPELINE, dense=4)
    cases["dense, schedule alone"] = make_case({"schedule": "1f1b"}, **PIPELINE, dense=4)
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def find_plain(case: str) -> str:
    """Return the case of plain DeepSpeed that a case is compared with."""
    return case.split(", ")[0] + ", plain"


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    asked = list_asked(request) | {RECORDED[name] for name in list_asked(request, "recorded")}
    asked |= {find_plain(case) for case in asked}
    return run_cases({case: one for case, one in make_cases(folder).items() if case in asked}, folder)


COMPARED = [case for case in make_cases(Path()) if not case.endswith(", plain")]
# The cases whose records are looked at, by the folder of the record.
RECORDED = {
    **{f"clones-{seed}": f"seed {seed}, clones" for seed in SEEDS},
    "homes": "seed 11, homes move",
    "alone": "homes alone, auto",
    **{what: f"{what}, clones" for what in ("recompute", "reentrant")},
}


@pytest.mark.parametrize("case", mark_nightly(COMPARED, lambda case: case not in NIGHTLY))
def test_steps_are_those_of_plain_deepspeed(trained: dict[str, Any], case: str) -> None:
    plain = trained[find_plain(case)]
    assert_same_steps(trained[case], plain)
    assert plain["steps"][-2]["loss"] < plain["steps"][0]["loss"] - 0.1, "the model learns nothing: equal losses say nothing"


@pytest.mark.parametrize("recorded", [*(f"clones-{seed}" for seed in SEEDS), "homes"])
def test_every_step_had_another_placement(trained: dict[str, Any], folder: Path, recorded: str) -> None:
    del trained
    steps = read_steps(folder / recorded)
    record = read_record(folder / recorded)
    placed = [[one.experts.tolist(), one.homes.tolist()] for one in map(record.find_placement, range(STEPS))]  # type: ignore[union-attr]
    assert len(steps) == STEPS
    assert len({json.dumps(one) for one in placed}) == STEPS
    assert all(step["clones"] > 0 for step in steps[1:])
    assert (sum(step["homes_moved"] for step in steps) > 0) == (recorded == "homes")


def test_clones_without_tokens_are_not_called() -> None:
    from counterflow.deepspeed.experts.layer import AutoEPSlots

    def fail(*_: Any) -> None:
        raise AssertionError("a clone without tokens computes")

    layer = SimpleNamespace(experts=lambda tokens, counts: tokens * counts.sum())
    slots = AutoEPSlots.__new__(AutoEPSlots)
    slots._own, slots._per_rank, slots._just_in_time, slots._clones = 2, 1, None, None
    slots._find_layer, slots.clone_module, slots.shared_module = lambda: layer, fail, None  # type: ignore[method-assign,assignment,return-value]
    tokens = torch.ones(5, 3)
    computed = slots.run_experts(None, tokens, torch.tensor([3, 2, 0]))
    assert torch.equal(computed, 5 * tokens)
    with pytest.raises(AssertionError, match="a clone without tokens computes"):
        slots.run_experts(None, tokens, torch.tensor([3, 1, 1]))


@pytest.mark.parametrize("recorded", ["alone"])
def test_homes_move_by_themselves_without_clones(trained: dict[str, Any], folder: Path, recorded: str) -> None:
    del trained
    steps = read_steps(folder / recorded)
    moved = [step["homes_moved"] for step in steps]
    assert not any(moved[:4]) and moved[4] > 0, "the gate knows enough after four steps"
    early, late = (np.mean([step["balancedness_after"] for step in part]) for part in (steps[:4], steps[4:]))
    assert late > early + 0.1, f"homes that moved do not balance: {early}, {late}"


@pytest.mark.parametrize("recorded", mark_nightly(["recompute", "reentrant"], lambda name: RECORDED[name] not in NIGHTLY))
def test_a_recomputed_layer_counts_its_tokens_once(trained: dict[str, Any], folder: Path, recorded: str) -> None:
    del trained
    counts = read_record(folder / recorded).counts
    # Two samples of 12 tokens on each of four ranks, two experts each.
    assert set(counts.sum(2).flatten().tolist()) == {2 * 12 * 4 * 2}


def read_steps(record: Path) -> list[dict[str, Any]]:
    """Return the lines of a record, in which all ranks have the same layers."""
    (path,) = record.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Larger steps let any difference grow.
    slow = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    half, long = BF16 | slow, {"steps": STEPS}
    cases = {"fp32": make_case(**long, changes=slow), "bf16": make_case(**long, changes=half)}
    cases["clones"] = make_case(clone(), **long, changes=half)
    cases["sums in fp32"] = make_case(clone(), **long, changes=half | {"data_types": {"grad_accum_dtype": "fp32"}})
    cases["dualpipev"] = make_case(clone("dualpipev"), **long, **PIPELINE, changes=half)
    cases["ZeRO-0"] = make_case(clone("dualpipev"), **long, **PIPELINE, zero=0, changes=half)
    cases["just in time"] = make_case(clone(**JUST_IN_TIME), **long, changes=half)
    cases["just in time, ZeRO-0"] = make_case(clone("dualpipev", **JUST_IN_TIME), **long, **PIPELINE, zero=0, changes=half)
    asked = {"fp32", "bf16"} | list_asked(request)
    return run_cases({case: one for case, one in cases.items() if case in asked}, tmp_path_factory.mktemp("rounded"))


ROUNDED = ["clones", "sums in fp32", "dualpipev", "ZeRO-0", "just in time", "just in time, ZeRO-0"]


@pytest.mark.parametrize(
    "case", mark_nightly(ROUNDED, lambda case: case in ("dualpipev", "just in time", "just in time, ZeRO-0"))
)
def test_clones_in_bf16_are_as_near_as_bf16_itself(rounded: dict[str, Any], case: str) -> None:
    losses = {name: np.array([step["loss"] for step in run["steps"]]) for name, run in rounded.items()}
    rounding = np.square(losses["bf16"] - losses["fp32"]).mean()
    assert np.square(losses[case] - losses["bf16"]).mean() <= rounding
    # At the first step nothing has had time to grow.
    first = [run["steps"][0]["grad_norm"] for run in (rounded[case], rounded["bf16"])]
    assert first[0] == pytest.approx(first[1], rel=HALF_TOLERANCE)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    half, cases = SHORT // 2, {"whole": make_case()}
    keys = {"plain": None, "clones": clone(rehome_interval=1), "pipeline": clone("dualpipev", rehome_interval=1)}
    for name, key in keys.items():
        pipeline = PIPELINE if name == "pipeline" else {}
        cases[f"{name} saves"] = make_case(key, steps=half, save=str(folder / name), **pipeline)
    for name, key, saver in (("plain", None, "clones"), ("clones", clone(), "plain"), ("clones again", clone(), "clones")):
        # Another seed: what is not loaded is not alike by chance.
        cases[f"{name} from {saver}"] = make_case(key, seed=SEEDS[1], load={"load_dir": str(folder / saver)})
    without = {"schedule": "dualpipev"}
    cases["dualpipev from pipeline"] = make_case(without, seed=SEEDS[1], load={"load_dir": str(folder / "pipeline")}, **PIPELINE)
    return run_cases(cases, folder) | {"folder": folder}


@pytest.mark.parametrize(
    "case", ["plain from clones", "clones from plain", "clones again from clones", "dualpipev from pipeline"]
)
def test_checkpoints_are_autoeps(resumed: dict[str, Any], case: str) -> None:
    run = resumed[case]
    assert [step["iteration"] for step in run["steps"]] == list(range(SHORT // 2 + 1, SHORT + 2))
    assert_same_steps(run, resumed["whole"])


def test_a_checkpoint_has_the_files_of_plain_deepspeed_and_the_last_loads(resumed: dict[str, Any]) -> None:
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (resumed["folder"] / "plain", resumed["folder"] / "clones")
    ]
    tag = f"global_step{SHORT // 2}"
    assert names[0] == {name for name in names[1] if not name.startswith(f"{tag}/counterflow/")}
    assert read_record(resumed["folder"] / "clones" / tag / "counterflow").counts.shape[0] == SHORT


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balanced")
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "monitor"), "job_name": "run"}}
    key = clone() | {"record": str(folder / "record")}
    run_cases({"run": make_case(key, steps=STEPS, changes=monitor)}, folder, scatter=False)
    return folder


def test_clones_balance_a_skewed_routing(balanced: Path) -> None:
    later = read_steps(balanced / "record")[STEPS // 2 :]
    before, after = (np.mean([step[f"balancedness_{when}"] for step in later]) for when in ("before", "after"))
    assert before < 0.75, "the routing is not skewed"
    assert after >= 0.95


def test_log_and_monitor_have_balancedness(balanced: Path) -> None:
    columns = []
    for name in ("balancedness_before", "balancedness"):
        (path,) = (balanced / "monitor").rglob(f"Train_EPLB_{name}.csv")
        rows = list(csv.reader(path.open()))[1:]
        assert [int(samples) for samples, _ in rows] == [16 * step for step in range(1, STEPS + 1)]
        columns.append([float(value) for _, value in rows])
    log = (balanced / "logs" / "0-0" / "0" / "stdout.log").read_text()
    logged = re.findall(r"step=(\d+), balancedness: ([\d.]+) -> ([\d.]+)", log)
    assert [int(step) for step, *_ in logged] == list(range(2, STEPS + 1, 2))
    for step, *values in logged:
        assert [float(value) for value in values] == pytest.approx([one[int(step) - 1] for one in columns], abs=1e-4)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (make_case(clone("1f1b"), **PIPELINE, dense=6), "AutoEP finds no MoE layer in this model"),
        pytest.param(
            make_case(clone(), **PIPELINE, dense=4, zero=0, changes=BF16),
            "give zero_optimization.stage 1",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_models_that_cannot_be_balanced_are_refused_on_all_ranks(case: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RanksError):
        run_cases({"bad": case}, tmp_path)
    written = (tmp_path / "logs" / "2-0" / "0" / "stderr.log").read_text()
    (line,) = [line for line in written.splitlines() if line.startswith("counterflow: ")]
    assert words in line
