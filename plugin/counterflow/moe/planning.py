"""Plan the clones of the next steps from the loads of past steps. One rank plans for all, during the optimizer step."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance import tiers
from counterflow.balance.clones import MOVE_PRICE, plan_clones
from counterflow.balance.costs import RESIDENT, Costs
from counterflow.balance.exact import add_shared_slots, plan_exact
from counterflow.balance.gate import ERRORS, LEAST_STEPS, MOST_STEPS, Judge, settle_homes
from counterflow.balance.homes import plan_homes
from counterflow.balance.moves import arrange_rounds, keep_slots
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, sum_by_rank
from counterflow.balance.prediction import LoadPredictor
from counterflow.balance.split import split_tokens

# The number of forecast loads for which a plan is made.
FORECASTS = 8
# The transfers of a clone in one step, in units of its half-precision weights: the weights arrive (1), and its gradients, in
# fp32, go home (2).
TRANSFERS_PER_STEP = 3


class HomeGate:
    """Decides when homes move by themselves: it keeps the loads of the last steps, and asks `settle_homes` now and then.

    It asks after `LEAST_STEPS` steps, and after as many again where homes moved; where none did, it waits for twice as long each
    time, up to `MOST_STEPS` steps: to ask takes as long as many plans of clones.

    ``plan`` is one of `counterflow.balance.tiers.PLANS`. Homes are judged beside the clones that it brings, ``shared`` of them on
    a rank just in time.
    """

    def __init__(self, traffic_weight: float, plan: str = "predicted", shared: int = 0, costs: Costs | None = None) -> None:
        self._traffic_weight, self._plan, self._shared, self._costs = traffic_weight, plan, shared, costs or Costs()
        self._past: deque[Array] = deque(maxlen=MOST_STEPS)
        self._wait = self._left = LEAST_STEPS

    def settle(self, counts: Array, forecasts: Array, microbatches: int, placement: Placement) -> Placement:
        """Return ``placement``, with other homes where these pay.

        ``counts``, ``int64[micro-batches, layers, experts]``, are the loads since the last call, ``microbatches`` of them a step.
        """
        steps = len(counts) // microbatches
        whole = counts[len(counts) - steps * microbatches :].astype(np.int32)
        if self._past and self._past[0].shape[0] != microbatches:
            # Steps of another size: their sum would be taken for another load.
            self._past.clear()
        self._past.extend(whole.reshape(steps, microbatches, *whole.shape[1:]))
        self._left -= steps
        if self._left > 0 or len(self._past) < LEAST_STEPS:
            return placement
        judge: Judge = partial(judge_homes, microbatches, self._traffic_weight, self._costs)
        if self._plan != "predicted":
            run = tiers.Run(self._plan, True, microbatches, microbatches, self._shared, self._costs)
            judge = partial(tiers.judge_homes, run)
        past = np.concatenate(self._past).astype(np.int64)
        # Without resident clones a move that turns out to be chance costs little beside the clones.
        errors = 0.0 if self._plan == "exact" else ERRORS
        settled = settle_homes(past, placement, microbatches, self._costs, judge, errors)
        assert placement.homes is not None and settled.homes is not None
        has_moved = bool((settled.homes != placement.homes).any())
        self._wait = LEAST_STEPS if has_moved else min(2 * self._wait, MOST_STEPS)
        self._left = self._wait
        return settled


class HomeInterval:
    """Decides whether homes move every so many steps, from forecasts of the loads until the next time."""

    def __init__(self, steps: int, traffic_weight: float) -> None:
        self._every, self._traffic_weight = steps, traffic_weight
        self._steps = 0

    def settle(self, counts: Array, forecasts: Array, microbatches: int, placement: Placement) -> Placement:
        """Return ``placement``, with other homes where that pays, if it is time; the arguments are those of `HomeGate.settle`."""
        self._steps += len(counts) // microbatches
        if self._steps < self._every:
            return placement
        self._steps = 0
        horizon = microbatches * self._every
        return plan_homes(forecasts, placement, horizon, traffic_weight=self._traffic_weight).placement


class ClonePlanner:
    """Plans on the first rank of ``group``, which broadcasts each plan to the others.

    ``group`` has the ranks that hold the same layers. ``interval`` is the number of steps between plans, ``traffic_weight`` is
    the parameter of `plan_clones`; ``homes`` decides when homes move, they stay without it. With ``costs`` the clones are planned
    as those beside just-in-time ones (`tiers.plan_residents`). One rank plans because processors that round differently could
    come to different placements.
    """

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup,
        device: torch.device,
        interval: int,
        traffic_weight: float,
        homes: HomeGate | HomeInterval | None = None,
        costs: Costs | None = None,
    ) -> None:
        self._placement, self._group, self._device, self._costs = placement, group, device, costs
        self._interval, self._traffic_weight, self._home_planner = interval, traffic_weight, homes
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
        forecasts = self._predictor.forecast(FORECASTS + (tiers.SPARE_FORECASTS if self._costs is not None else 0))
        if self._home_planner is not None:
            placement = self._home_planner.settle(counts, forecasts, microbatches, placement)
        return plan_next(forecasts, placement, microbatches, self._traffic_weight, self._costs)


def plan_next(
    forecasts: Array, placement: Placement, microbatches: int, traffic_weight: float, costs: Costs | None = None
) -> Placement:
    """Return the placement of the next step.

    The optimizer changes the homes, so every clone is sent again in every step, even to a slot that held it before. Each clone
    therefore has to save more time, within the micro-batches of one step, than its transfers cost. With ``costs`` just-in-time
    clones are there too, and serve what is rare.
    """
    if costs is not None:
        run = tiers.Run("auto", False, microbatches, microbatches, 0, costs)
        return tiers.plan_residents(forecasts, placement, run, begins=True)
    if not has_clone_slots(placement):
        return placement
    bare = clear_clones(placement)
    plan = plan_clones(forecasts, bare, microbatches, TRANSFERS_PER_STEP * MOVE_PRICE, traffic_weight)
    return keep_slots(placement, plan.placement)


def judge_homes(
    microbatches: int, traffic_weight: float, costs: Costs, found: Array, judged: Array, placement: Placement
) -> Array:
    """Return ``float64[samples, layers]``: seconds of the slowest rank in each micro-batch of ``judged``.

    Its clones are those that `plan_next` finds from ``found``; both are ``[samples, layers, experts]``. What of the transfers of
    clones is not hidden counts too, shared by the ranks and the micro-batches of a step.
    """
    planned = plan_next(found.astype(np.float64), placement, microbatches, traffic_weight)
    loads = np.stack([sum_by_rank(split_tokens(counts, planned), planned.cluster) for counts in judged])
    sent = tiers.count_clones(planned) @ [
        costs.exposed * costs.time_transfer(RESIDENT, is_far=is_far) for is_far in (False, True)
    ]
    times: Array = loads.max(2) * costs.token_time + sent / (microbatches * planned.cluster.ranks)
    return times


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
    split_tokens(np.array([[9, 1, 1, 1]]), placement)
    share_tokens(np.full((2, 4), 3), placement, np.arange(2))
    arrange_rounds(np.array([0, 1]), np.array([1, 0]), 2, 1)
    wide, shared = add_shared_slots(homes, 1)
    plan_exact(np.array([[9, 1, 1, 1]]), wide, shared)
