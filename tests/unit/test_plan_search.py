"""The search of layouts: as good as trying everything, with a reason for each that is not taken."""

from itertools import product
from typing import Any

import pytest

from counterflow.errors import PlanError, ScheduleError
from counterflow.planner import search
from counterflow.planner.assumptions import can_overlap, choose_dispatcher
from counterflow.planner.bounds import bound_schedule, bound_step
from counterflow.planner.choices import (
    LOOPED_KIND,
    complete_choice,
    explain_refusal,
    find_kind,
    list_schedules,
    list_shardings,
    list_sizes,
)
from counterflow.planner.cluster import build_cluster
from counterflow.planner.config import parse_config
from counterflow.planner.constants import Constants
from counterflow.planner.emission import emit_megatron
from counterflow.planner.estimate import Estimate, estimate_plan
from counterflow.planner.models import build_model
from counterflow.planner.search import search_layouts
from counterflow.planner.searched import search_table
from counterflow.planner.splits import split_evenly
from counterflow.planner.step import cost_chunks
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


def list_all(plan: dict[str, Any]) -> list[tuple[Estimate, float, float]]:
    """Return every layout of a plan that a trainer runs, with the bound of its sizes and of its schedule."""
    config, constants = parse_config(plan), Constants()
    cluster = build_cluster(config.cluster)
    found = []
    for fields in list_sizes(config, build_model(config.model), cluster, config.cluster.gpus or 1):
        for choice, sharding in product(list_schedules(config, fields), list_shardings(config)):
            try:
                assumed = complete_choice(config, {**choice, **sharding._asdict()}, cluster)
                estimate = estimate_plan(assumed, cluster, constants)
            except (PlanError, ScheduleError):
                continue
            if assumed.plan.layout.overlap == choice["overlap"] and not explain_refusal(assumed.plan):
                chunks = cost_chunks(assumed.plan, estimate.setting)
                whole = bound_schedule(assumed.plan, chunks, estimate.setting)
                found.append((estimate, bound_step(assumed, cluster, constants), whole))
    return found


@pytest.mark.parametrize("training", [{}, {"routing": "natural"}], ids=["forced", "natural"])
def test_the_search_finds_the_best_of_all_and_no_bound_is_above_its_step(training: dict[str, Any]) -> None:
    plan = {**SMALL, "training": {**SMALL["training"], **training}}
    everything = [one for one in list_all(plan) if one[0].fits is not False]
    assert all(max(bound, whole) <= estimate.step_s * (1 + 1e-9) for estimate, bound, whole in everything)
    assert {(one.plan.layout.fsdp, one.plan.layout.etp) for one, _, _ in everything} >= {(False, 1), (True, 1), (False, 2)}
    found = search_layouts(parse_config(plan), seconds=300, keep=3)
    assert found.untried == 0
    fastest = sorted(estimate.step_s for estimate, _, _ in everything if estimate.fits)[:3]
    assert [one.step_s for one in found.candidates[:3]] == pytest.approx(fastest)
    looped = [one.step_s for one, _, _ in everything if one.fits and find_kind(one.plan) == LOOPED_KIND]
    assert found.looped is not None and found.looped.step_s == pytest.approx(min(looped))


def test_one_process_and_several_find_the_same_and_account_for_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [estimate for estimate, _, _ in list_all(SMALL)]
    steps = []
    for most in (1, 2):
        monkeypatch.setattr(search, "MOST_PROCESSES", most)
        monkeypatch.setattr(search, "FEW", 1)
        # So many are kept that no bound leaves out any.
        found = search_layouts(parse_config(SMALL), seconds=300, keep=len(everything) + 1)
        steps.append([one.step_s for one in found.candidates])
        assert all(one.reason for one in found.rejected)
    assert steps[0] == steps[1]
    assert len(steps[0]) == found.tried == sum(one.fits is not False for one in everything)


def test_a_bound_holds_under_calibrated_constants() -> None:
    config, constants = parse_config(SMALL), Constants().multiply({"general.scale": 0.5})
    cluster = build_cluster(config.cluster)
    fields = {"tp": 1, "pp": 4, "cp": 1, "ep": 2, "etp": 1, "schedule": "1f1b", "overlap": False, "clones_per_rank": 0}
    assumed = complete_choice(config, fields, cluster)
    assert bound_step(assumed, cluster, constants) <= estimate_plan(assumed, cluster, constants).step_s


@pytest.mark.parametrize(("routing", "model"), [(None, {}), ("natural", {}), ("forced", {}), ("forced", {"num_experts": 0})])
def test_a_router_is_forced_only_where_a_plan_of_experts_says_so(routing: str | None, model: dict[str, Any]) -> None:
    plan = SMALL | {"training": SMALL["training"] | {"routing": routing}, "model": SMALL["model"] | model}
    config = parse_config(plan)
    cluster = build_cluster(config.cluster)
    assumed = complete_choice(config, {"tp": 1, "pp": 1, "ep": 1, "schedule": "1f1b", "overlap": False}, cluster)
    is_asked = routing == "forced" and not model
    assert ("--moe-router-force-load-balancing" in emit_megatron(assumed.plan)) == is_asked
    assert any("to measure" in note for note in assumed.plan.notes) == is_asked


def test_only_the_blocks_that_are_recomputed_take_time_for_it() -> None:
    cluster, steps = build_cluster(parse_config(SMALL).cluster), []
    for recompute in ("none", "full,block,0", "full,block,1", "full,block,5", "full,block,8", "full,uniform,1"):
        config = parse_config(SMALL | {"layout": {"micro_batch_size": 1, "recompute": recompute}})
        fields = {"tp": 1, "pp": 2, "ep": 4, "schedule": "1f1b", "overlap": False}
        steps.append(estimate_plan(complete_choice(config, fields, cluster), cluster, Constants()).step_s)
    none, *blocks, every = steps
    assert blocks[0] == none and blocks[-1] == every, "a chunk has 8 layers"
    assert blocks == sorted(set(blocks)), "each block that is recomputed takes longer"


def test_what_is_given_is_not_searched() -> None:
    plan = {**SMALL, "layout": {**SMALL["layout"], "pp": 2, "schedule": "zbv", "ep": 4}}
    found = search_layouts(parse_config(plan), seconds=300)
    layouts = {(one.plan.layout.pp, one.plan.layout.schedule, one.plan.layout.ep) for one in found.candidates}
    assert layouts == {(2, "zbv", 4)}


def test_the_front_has_nobody_who_is_slower_and_larger() -> None:
    found = search_layouts(parse_config(SMALL), seconds=300)
    points = [(one.step_s, max(one.memory.per_rank)) for one in found.pareto]
    assert points == sorted(points) and [size for _, size in points] == sorted((size for _, size in points), reverse=True)
    assert found.pareto[0].step_s == min(one.step_s for one in found.candidates)


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
    dealt = split_evenly(even, cluster, Constants())
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
