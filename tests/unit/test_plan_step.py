"""The step of a plan: the clock is the simulator's, long steps are cut exactly, causes add up."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.clock import compile_table
from counterflow.planner.config import parse_config
from counterflow.planner.estimate import describe, estimate_config
from counterflow.planner.explain import explain_step, try_changes
from counterflow.planner.layouts import Layout, build_table
from counterflow.planner.step import cut_microbatches, list_homes, run_table
from counterflow.schedule import FAMILIES, Costs, add_reductions, build, simulate
from tests.support.running import refuses

PLAN: dict[str, Any] = {
    "model": {"name": "Qwen3-30B-A3B"},
    "cluster": {"gpu": "H100", "gpus": 64},
    "training": {"seq_length": 4096, "global_batch_size": 512, "precision": "bf16", "routing": "forced"},
    "layout": {"pp": 4, "ep": 8, "micro_batch_size": 1, "schedule": "dualpipev", "overlap": True},
}


def make_plan(**layout: Any) -> dict[str, Any]:
    return {**PLAN, "layout": {**PLAN["layout"], **layout}}


def make_costs(stages: int, seed: int) -> Costs:
    random.seed(seed)
    f, i, w, reduce = (tuple(random.uniform(0.5, 2.0) for _ in range(stages)) for _ in range(4))
    return Costs(f, i, w, p2p=random.uniform(0, 0.3), overlap=random.uniform(0.6, 1.1), reduce=reduce)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_clock_is_the_simulation(name: str) -> None:
    for ranks, microbatches, seed in itertools.product((2, 4), (8, 12), (1, 2)):
        try:
            table = build(name, ranks, microbatches)
        except ScheduleError:
            continue
        costs = make_costs(table.layout.last_stage + 1, seed)
        timeline = simulate(add_reductions(table), costs)
        makespan, busy = compile_table(table).run(costs)
        assert makespan == pytest.approx(timeline.makespan, rel=1e-12)
        assert busy == pytest.approx(sum(span.end - span.start for span in timeline.spans), rel=1e-12)


@pytest.mark.parametrize(("name", "vpp", "overlap"), [
    ("1f1b", 1, False), ("interleaved", 2, False), ("interleaved", 4, True), ("zb-h1", 1, False), ("zbv", 2, False),
    ("dualpipev", 2, True), ("dualpipe", 2, True), ("gpipe", 1, False),
])  # fmt: skip
def test_a_long_step_goes_on_as_its_first_rounds(name: str, vpp: int, overlap: bool) -> None:
    layout = Layout(pp=4, vpp=vpp, schedule=name, overlap=overlap)
    for microbatches, seed in ((64, 1), (96, 2)):
        assert cut_microbatches(layout, microbatches) < microbatches
        costs = make_costs(layout.stages, seed)
        whole = simulate(add_reductions(build_table(layout, microbatches)), costs).makespan
        assert run_table(layout, microbatches, costs)[0] == pytest.approx(whole, rel=5e-3)


def test_ranks_that_wait_for_ever_are_refused() -> None:
    from dataclasses import replace

    table = build("1f1b", 2, 4)
    stuck = replace(table, actions=(table.actions[0][::-1], table.actions[1]))
    with pytest.raises(ScheduleError, match="for ever"):
        compile_table(stuck)


def test_homes_are_those_of_the_table() -> None:
    assert list_homes(Layout(pp=4, vpp=2, schedule="zbv")) == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert list_homes(Layout(pp=2, vpp=2, schedule="interleaved")) == ((0, 2), (1, 3))


@pytest.mark.parametrize("layout", [
    {}, {"overlap": False}, {"schedule": "1f1b", "overlap": False}, {"schedule": "interleaved", "vpp": 4, "overlap": True},
    {"tp": 2, "schedule": "zb-h1", "overlap": False}, {"pp": 1, "schedule": "1f1b", "overlap": True},
    {"schedule": "interleaved", "vpp": 2, "overlap": False, "recompute": "full"},
])  # fmt: skip
def test_causes_add_up_to_the_step(layout: dict[str, Any]) -> None:
    estimate = estimate_config(parse_config(make_plan(**layout)))
    assert sum(estimate.step.causes.values()) == pytest.approx(estimate.step_s, rel=1e-9)
    assert sum(bar.seconds for bar in explain_step(estimate)) == pytest.approx(estimate.step_s, rel=1e-4)
    assert all(seconds >= -1e-9 for name, seconds in estimate.step.causes.items()), estimate.step.causes


def test_a_better_schedule_has_less_bubble_and_overlap_hides_the_exchange() -> None:
    def step(**layout: Any) -> Any:
        return estimate_config(parse_config(make_plan(**layout)))

    plain, pairs = step(overlap=False), step()
    straight = step(schedule="1f1b", overlap=False)
    assert plain.step.bubble < straight.step.bubble
    assert pairs.step.causes["experts' exchange"] < 0.7 * plain.step.causes["experts' exchange"]
    assert pairs.step_s < plain.step_s < straight.step_s


def test_imbalance_costs_and_clones_save() -> None:
    natural = {**PLAN, "training": {**PLAN["training"], "routing": "natural"}}
    cloned = {**natural, "layout": {**PLAN["layout"], "clones_per_rank": 2}}
    forced, uneven, balanced = (estimate_config(parse_config(plan)) for plan in (PLAN, natural, cloned))
    assert forced.step_s < balanced.step_s < uneven.step_s
    bars = {bar.cause: bar.seconds for bar in explain_step(uneven)}
    assert bars["imbalance"] == pytest.approx(uneven.step_s - forced.step_s, rel=1e-6)


def test_slower_links_and_more_imbalance_take_longer() -> None:
    estimate = estimate_config(parse_config(PLAN))
    links, imbalance, nodes = try_changes(estimate)
    assert links.seconds and imbalance.seconds and nodes.seconds
    assert links.seconds > estimate.step_s and imbalance.seconds > estimate.step_s > nodes.seconds


def test_measured_costs_take_the_place_of_the_models(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"unit": "ms", "f": 10, "i": 12, "w": 8, "p2p": 0, "reduce": 0}))
    plan = {**make_plan(schedule="1f1b", overlap=False), "costs": str(path)}
    estimate = estimate_config(parse_config(plan))
    table = build_table(estimate.plan.layout, estimate.plan.microbatches)
    assert estimate.step.makespan == pytest.approx(simulate(table, Costs(0.010, 0.012, 0.008)).makespan, rel=1e-3)
    path.write_text(json.dumps({"f": [1, 2, 3], "i": 1, "w": 1}))
    with refuses("these are costs of another model or layout", PlanError):
        estimate_config(parse_config(plan))


@pytest.mark.parametrize("costs", [
    # Together below what the model's exchange of experts alone takes, about the model's own, and above it.
    {"f": 8, "i": 8, "w": 4}, {"f": 18, "i": 20, "w": 15, "overlap": 0.55}, {"f": 60, "i": 60, "w": 40, "overlap": 1.3},
])  # fmt: skip
@pytest.mark.parametrize("routing", ["forced", "natural"])
def test_measured_costs_add_up_in_the_waterfall_and_change_with_the_model(
    costs: dict[str, float], routing: str, tmp_path: Path
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"unit": "ms", "source": "a trace", **costs}))
    plan = {**make_plan(), "costs": str(path), "training": {**PLAN["training"], "routing": routing}}
    estimate = estimate_config(parse_config(plan))
    bars = explain_step(estimate)
    assert sum(bar.seconds for bar in bars) == pytest.approx(estimate.step_s, rel=1e-4)
    assert all(bar.seconds > 0 for bar in bars), bars
    assert any("costs.json (a trace)" in note for note in estimate.plan.notes)
    links, imbalance, nodes = (change.seconds for change in try_changes(estimate))
    assert links and imbalance and nodes and links > estimate.step_s > nodes and imbalance > estimate.step_s
    twice = estimate_config(parse_config({**plan, "cluster": {"gpu": "H100", "gpus": 128}}))
    assert nodes == pytest.approx(twice.step_s, rel=1e-2)


def test_launches_that_pairs_wait_for_are_the_hosts() -> None:
    plan = {**make_plan(pp=2), "cluster": {"gpu": "H100", "gpus": 16}}
    plan["training"] = {**PLAN["training"], "global_batch_size": 256, "precision": "fp8-blockwise"}
    hosted = estimate_config(parse_config(plan)).step
    alone = estimate_config(parse_config({**plan, "layout": {**plan["layout"], "overlap": False}})).step
    assert hosted.causes["experts' exchange"] < alone.causes["experts' exchange"]
    assert hosted.causes["host"] > 0.3 * hosted.seconds
    assert sum(hosted.causes.values()) == pytest.approx(hosted.seconds)


def test_an_estimate_says_what_json_promises() -> None:
    found = describe(estimate_config(parse_config(PLAN)), price=2.0)
    wanted = {"step_s", "tokens_per_s_per_gpu", "bubble", "gpu_hours_per_trillion_tokens", "memory_gib", "memory_parts", "fits"}
    assert wanted | {"range", "layout", "why"} <= set(found)
    tokens = 512 * 4096 / found["step_s"] / 64
    assert found["tokens_per_s_per_gpu"] == pytest.approx(tokens)
    assert found["cost_per_trillion_tokens"] == pytest.approx(2.0 * 1e12 / tokens / 3600)
    assert found["range"][0] < found["step_s"] < found["range"][1] and len(found["memory_gib"]) == 4
    json.dumps(found, allow_nan=False)
