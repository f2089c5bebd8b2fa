"""Plan the clones of the next steps from the loads of past steps. One rank plans for all, during the optimizer step."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.clones import MOVE_PRICE, plan_clones
from counterflow.balance.exact import add_shared_slots, plan_exact
from counterflow.balance.homes import plan_homes
from counterflow.balance.moves import arrange_rounds, keep_slots
from counterflow.balance.placement import EMPTY, Placement, make_home_placement
from counterflow.balance.prediction import LoadPredictor

# The number of forecast loads for which a plan is made.
FORECASTS = 8
# The transfers of a clone in one step, in units of its half-precision weights: the weights arrive (1), and its gradients, in
# fp32, go home (2).
TRANSFERS_PER_STEP = 3


class ClonePlanner:
    """Plans on the first rank of ``group``, which broadcasts each plan to the others.

    ``group`` has the ranks that hold the same layers. ``interval`` is the number of steps between plans, ``rehome_interval``
    the number of steps between plans that may move homes, ``traffic_weight`` is the parameter of `plan_clones`. One rank plans
    because processors that round differently could come to different placements.
    """

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup,
        device: torch.device,
        interval: int,
        rehome_interval: int | None,
        traffic_weight: float,
    ) -> None:
        self._placement, self._group, self._device = placement, group, device
        self._interval, self._rehome_interval, self._traffic_weight = interval, rehome_interval, traffic_weight
        self._steps = 0
        self._leader = dist.get_process_group_ranks(group)[0]
        self._predictor: LoadPredictor | None = None
        self._pool = ThreadPoolExecutor(1, "counterflow-plan") if group.rank() == 0 else None
        self._planned: Future[Placement] | None = None
        self._is_due = False

    def start(self, counts: Array, microbatches: int, placement: Placement) -> None:
        """Start to plan in a thread.

        ``counts``, ``int64[micro-batches, layers, experts]``, are the loads of the steps since the last plan. ``microbatches``
        is their number in one step; ``placement`` is the one in use now.
        """
        self._is_due = True
        self._steps += self._interval
        if self._pool is not None:
            self._planned = self._pool.submit(self._plan, counts, microbatches, placement)

    def resume(self, counts: Array | None, microbatches: int, placement: Placement) -> None:
        """Start to plan from the loads that an earlier run kept, if the first rank has any. Every rank of the group calls it."""
        found = torch.tensor([counts is not None], dtype=torch.int64, device=self._device)
        dist.broadcast(found, self._leader, group=self._group)
        self._is_due = bool(found)
        if self._pool is not None and counts is not None:
            self._planned = self._pool.submit(self._plan, counts, microbatches, placement)

    def take(self) -> Placement | None:
        """Return the plan that was started, the same on all ranks; None if none was. Every rank of the group calls it."""
        if not self._is_due:
            return None
        self._is_due = False
        slots = self._placement.cluster.slots
        plan = torch.empty((self._placement.layers, slots + self._homes.shape[1]), dtype=torch.int64, device=self._device)
        if self._planned is not None:
            planned = self._planned.result()
            assert planned.homes is not None
            plan.copy_(torch.from_numpy(np.concatenate((planned.experts, planned.homes), 1)))
        dist.broadcast(plan, self._leader, group=self._group)
        experts, homes = np.split(plan.cpu().numpy(), [slots], 1)
        return Placement(self._placement.cluster, experts, homes)

    @property
    def _homes(self) -> Array:
        assert self._placement.homes is not None
        return self._placement.homes

    def _plan(self, counts: Array, microbatches: int, placement: Placement) -> Placement:
        if self._predictor is None:
            self._predictor = LoadPredictor(counts.shape[1], counts.shape[2], microbatches * self._interval)
        for seen in counts:
            self._predictor.observe(seen)
        forecasts = self._predictor.forecast(FORECASTS)
        if self._rehome_interval is not None and self._steps >= self._rehome_interval:
            self._steps = 0
            horizon = microbatches * self._rehome_interval
            placement = plan_homes(forecasts, placement, horizon, traffic_weight=self._traffic_weight).placement
        return plan_next(forecasts, placement, microbatches, self._traffic_weight)


def plan_next(forecasts: Array, placement: Placement, microbatches: int, traffic_weight: float) -> Placement:
    """Return the placement of the next step.

    The optimizer changes the homes, so every clone is sent again in every step, even to a slot that held it before. Each clone
    therefore has to save more time, within the micro-batches of one step, than its transfers cost.
    """
    if not has_clone_slots(placement):
        return placement
    bare = clear_clones(placement)
    plan = plan_clones(forecasts, bare, microbatches, TRANSFERS_PER_STEP * MOVE_PRICE, traffic_weight)
    return keep_slots(placement, plan.placement)


def clear_clones(placement: Placement) -> Placement:
    """Return ``placement`` without its clones."""
    assert placement.homes is not None
    experts = np.full_like(placement.experts, EMPTY)
    np.put_along_axis(experts, placement.homes, np.broadcast_to(np.arange(placement.homes.shape[1]), placement.homes.shape), 1)
    return Placement(placement.cluster, experts, placement.homes)


def has_clone_slots(placement: Placement) -> bool:
    """Tell whether there are slots for clones."""
    assert placement.homes is not None
    return bool(placement.cluster.slots > placement.homes.shape[1])


def compile_planner() -> None:
    """Compile the balancer's kernels, first on the first rank of each node, then load them on its other ranks.

    Compiling takes up to a minute, once per installation.
    """
    from counterflow.balance.kernels.sharing import share_layer
    from counterflow.compiling import is_compiled

    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if dist.get_rank() == 0 and not is_compiled(share_layer):
        print("counterflow: eplb: compiling the balancer, which takes up to a minute, once per installation", flush=True)
    for turn in (is_first, not is_first):
        if turn:
            _run_small()
        dist.barrier()


def _run_small() -> None:
    from counterflow.balance.shares import share_tokens

    homes = make_home_placement(1, 4, 2, 1)
    placement = plan_clones(np.array([[9.0, 1.0, 1.0, 1.0]]), homes, move_price=0.0).placement
    plan_homes(np.array([[9.0, 1.0, 1.0, 1.0]]), homes, 8)
    share_tokens(np.full((2, 4), 3), placement, np.arange(2))
    arrange_rounds(np.array([0, 1]), np.array([1, 0]), 2, 1)
    wide, shared = add_shared_slots(homes, 1)
    plan_exact(np.array([[9, 1, 1, 1]]), wide, shared)
