"""Seconds that no step of a choice can be below, without a table.

First of sizes alone: the work of the micro-batches, spread over the pipeline, nothing waiting. Then of a schedule: the work of
the fullest rank, all its pairs overlapped, behind what has to come before it, and what follows the table.
"""

from itertools import accumulate

from counterflow.planner.assumptions import Assumed
from counterflow.planner.cluster import Cluster
from counterflow.planner.constants import Constants
from counterflow.planner.estimate import make_setting
from counterflow.planner.layouts import Plan, place_layers
from counterflow.planner.step import ChunkCosts, list_homes, time_ends
from counterflow.planner.times import Setting, Times, time_head, time_layer
from counterflow.schedule.costs import spread_over
from counterflow.schedule.families import FAMILIES


def bound_step(assumed: Assumed, cluster: Cluster, constants: Constants) -> float:
    """Return seconds that no schedule of these sizes can be below: work without a bubble, as much exchange hidden as can be."""
    plan = assumed.plan
    setting = make_setting(assumed, cluster, constants).local.without_blocks
    whole = Times()
    for layer, times in plan.model.counts:
        work = time_layer(layer, setting)
        whole += (work.f + work.i + work.w) * times
    head = time_head(plan.model, setting)
    whole += (head.f + head.i + head.w) * (1 + plan.model.mtp_layers)
    if plan.model.mtp is not None:
        work = time_layer(plan.model.mtp, setting)
        whole += (work.f + work.i + work.w) * plan.model.mtp_layers
    # Pairs hide no more than this; sums over chunks of what is longer are no less than what is longer of the sums.
    device = whole.device - constants["general.hidden"] * min(whole.expert, whole.compute)
    return plan.microbatches * max(device, whole.host) * constants["general.scale"] / plan.layout.pp


def bound_schedule(plan: Plan, chunks: ChunkCosts, setting: Setting) -> float:
    """Return seconds that no step of a plan can be below whose actions cost ``chunks``.

    A rank begins when a micro-batch has passed the stages before its first one. Where backwards are not split, the last one that
    it runs goes on through those stages.
    """
    layout, stages = plan.layout, place_layers(plan.model, plan.layout)
    f, i, w = (spread_over(part, layout.stages, "costs") for part in (chunks.costs.f, chunks.costs.i, chunks.costs.w))
    share = min(chunks.costs.overlap, 1.0) if layout.overlap else 1.0
    family = FAMILIES.get(layout.schedule)
    ahead = [0.0, *accumulate(f)]
    behind = (
        [0.0, *accumulate(map(sum, zip(i, w, strict=True)))] if family is not None and not family.splits else [0.0] * len(ahead)
    )
    longest = 0.0
    for own in list_homes(layout):
        busy = share * plan.microbatches * sum(f[stage] + i[stage] + w[stage] for stage in own)
        longest = max(longest, ahead[min(own)] + busy + behind[min(own)])
    return longest + sum(time_ends(plan, setting, stages))
