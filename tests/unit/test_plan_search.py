"""The search of layouts: as good as trying everything, with a reason for each that is not taken."""

from typing import Any

import pytest

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner.assumptions import can_overlap, choose_dispatcher
from counterflow.planner.cluster import build_cluster
from counterflow.planner.config import parse_config
from counterflow.planner.constants import Constants
from counterflow.planner.estimate import estimate_plan
from counterflow.planner.models import build_model
from counterflow.planner.search import (
    bound_step,
    complete_choice,
    find_pareto,
    list_schedules,
    list_sizes,
    search_layouts,
    split_evenly,
)
from counterflow.planner.searched import search_table
from tests.support.running import refuses

SMALL: dict[str, Any] = {
    "model": {
        "num_layers": 16, "hidden_size": 1024, "num_attention_heads": 16, "num_experts": 16, "moe_router_topk": 2,
        "moe_ffn_hidden_size": 1024, "swiglu": True, "vocab_size": 32000,
    },
    "cluster": {"gpu": "H100", "gpus": 8},
    "training": {"seq_length": 2048, "global_batch_size": 64, "precision": "bf16", "routing": "forced"},
    "layout": {"micro_batch_size": 1, "recompute": "none"},
}  # fmt: skip


def list_all(plan: dict[str, Any]) -> list[Any]:
    config, constants = parse_config(plan), Constants()
    cluster = build_cluster(config.cluster)
    found = []
    for fields in list_sizes(config, build_model(config.model), cluster, config.cluster.gpus or 1):
        for choice in list_schedules(config, fields):
            try:
                assumed = complete_choice(config, choice, cluster)
                estimate = estimate_plan(assumed, cluster, constants)
            except (PlanError, ScheduleError):
                continue
            bound = bound_step(assumed, cluster, constants)
            if assumed.plan.layout.overlap == choice["overlap"]:
                found.append((estimate, bound))
    return found


@pytest.mark.parametrize("training", [{}, {"routing": "natural"}], ids=["forced", "natural"])
def test_the_search_finds_the_best_of_all_and_no_bound_is_above_its_step(training: dict[str, Any]) -> None:
    plan = {**SMALL, "training": {**SMALL["training"], **training}}
    everything = [(estimate, bound) for estimate, bound in list_all(plan) if estimate.fits is not False]
    assert all(bound <= estimate.step_s for estimate, bound in everything)
    found = search_layouts(parse_config(plan), seconds=300, keep=3)
    assert found.untried == 0
    fastest = sorted(estimate.step_s for estimate, _ in everything if estimate.fits)[:3]
    assert [one.step_s for one in found.candidates[:3]] == pytest.approx(fastest)


def test_what_is_given_is_not_searched() -> None:
    plan = {**SMALL, "layout": {**SMALL["layout"], "pp": 2, "schedule": "zbv", "ep": 4}}
    found = search_layouts(parse_config(plan), seconds=300)
    layouts = {(one.plan.layout.pp, one.plan.layout.schedule, one.plan.layout.ep) for one in found.candidates}
    assert layouts == {(2, "zbv", 4)}


def test_the_front_has_nobody_who_is_slower_and_larger() -> None:
    found = search_layouts(parse_config(SMALL), seconds=300)
    points = [(one.step_s, max(one.memory.per_rank)) for one in found.pareto]
    assert points == sorted(points) and [size for _, size in points] == sorted((size for _, size in points), reverse=True)
    assert find_pareto(found.candidates) == found.pareto


def test_a_cluster_that_is_too_small_names_one_that_would_do() -> None:
    plan = {
        "model": {"name": "DeepSeek-V3"}, "cluster": {"gpu": "H100", "gpus": 16},
        "training": {"seq_length": 4096, "global_batch_size": 512}, "layout": {"micro_batch_size": 1},
    }  # fmt: skip
    with refuses("GPUs would do", PlanError):
        search_layouts(parse_config(plan), seconds=20)


def test_what_does_not_fit_says_which_rank_and_what_part() -> None:
    plan = {**SMALL, "cluster": {"gpu": "H100", "gpus": 8, "memory_gib": 6}}
    found = search_layouts(parse_config(plan), seconds=300)
    assert any("GiB of 6" in one.reason and "rank" in one.reason for one in found.rejected)


def test_ends_with_embedding_and_head_get_fewer_layers_where_that_is_faster() -> None:
    large = {**SMALL, "model": {**SMALL["model"], "vocab_size": 256000}}
    fixed = {**SMALL["layout"], "pp": 4, "schedule": "1f1b", "ep": 2}
    config, cluster = parse_config({**large, "layout": fixed}), build_cluster(parse_config(SMALL).cluster)
    even = search_layouts(config, seconds=300).candidates[0]
    dealt = split_evenly(even, config, cluster, Constants())
    assert dealt.step_s < even.step_s and dealt.plan.layout.pipeline_layout is not None


def test_a_searched_table_is_no_slower_than_the_family_whose_stages_it_has() -> None:
    plan = {**SMALL, "layout": {**SMALL["layout"], "pp": 4, "schedule": "zbv", "ep": 2}}
    estimate = search_layouts(parse_config(plan), seconds=300).candidates[0]
    searched = search_table(estimate, 2.0)
    if searched is not None:
        assert searched.estimate.step_s < estimate.step_s and searched.gap > -1e-9
        assert searched.table.layout.name == "v"


def test_dispatch_follows_the_domain() -> None:
    sections = [parse_config({**SMALL, "cluster": {"gpu": gpu, "gpus": 8}}).cluster for gpu in ("H100", "GB300")]
    h100, gb300 = map(build_cluster, sections)
    assert [choose_dispatcher(ranks, h100) for ranks in (8, 64)] == ["alltoall", "deepep"]
    assert choose_dispatcher(8, gb300) == "hybridep"
    assert can_overlap(1, "1f1b") and can_overlap(4, "dualpipev") and not can_overlap(4, "zbv")
