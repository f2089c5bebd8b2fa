"""One rank of the balancing tests: `worker.py` with clones that change at every step and are compared with their homes.

A case may have "plans": "drawn" (the default: placements drawn anew for every step, homes too where they may move, and
just-in-time clones for every micro-batch), "lasting" (the same just-in-time clones in every micro-batch) or "made" (the
planner's), the "seed" of what is drawn, and "kill": {"rank", "method", "step"}, where that rank kills itself behind its call of a
method of `Clones`, `BalancedModel` or `JustInTime`. Experts that are "shunned" get no tokens. A result has "clones": what `Watch`
saw on all ranks, summed up.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import worker
from counterflow.arrays import Array
from counterflow.balance.placement import EMPTY, Placement
from counterflow.moe import layer as moe_layer
from counterflow.moe import planning
from counterflow.moe.just_in_time import JustInTime, is_in_backward
from counterflow.patching import Patches
from tests.support.drawn_loans import EMPTY_SHARE, LoanDrawer

Key = tuple[int, int, int, int]


class Watch:
    """What one rank saw in a case: the bits of homes and clones wherever they computed, and what changed.

    Keys of bits: the first rank of the expert-parallel group, the number of the refresh, layer, expert.
    """

    def __init__(self) -> None:
        self.homes: dict[Key, set[str]] = {}
        self.clones: dict[Key, set[str]] = {}
        self.clone_tokens = 0
        self.placements: list[str] = []
        self.loans: list[str] = []
        self.backwards = self.plans = 0
        # Just-in-time clones whose weights were sent: since the last step, and by step, in one replica of the experts.
        self.sending = 0
        self.sent: list[int] = []
        self.said: list[dict[str, float]] = []
        self.steps = self.refreshes = 0
        self.is_planning = False

    def see_experts(self, slots: Any, tokens_per_slot: Any) -> None:
        """Note the bits of a layer's experts on this rank, as they are when they compute."""
        held = slots.list_experts()
        own, width = len(held.homes), len(held.homes) + len(held.clones) + len(held.shared)
        group = slots.layer.ep_group
        experts = slots.dealt.table.placement.experts[0][group.rank() * width : (group.rank() + 1) * width].tolist()
        self.clone_tokens += int(tokens_per_slot[own:].sum())
        tensors = [
            list_computed(slots.layer.experts, place, weights, is_cached=False) for place, weights in enumerate(held.homes)
        ]
        tensors += [
            list_computed(slots.clone_module, place, weights, is_cached=True) for place, weights in enumerate(held.clones)
        ]
        for slot, (expert, weights) in enumerate(zip(experts, tensors, strict=False)):
            # Those in shared slots are seen where they compute (`see_loan`).
            # What an empty slot or one that no token came to holds is of no concern: it may be under way.
            if slot < own or int(tokens_per_slot[slot]):
                key = (dist.get_process_group_ranks(group)[0], self.refreshes, slots._index, expert)
                seen = self.homes if slot < own else self.clones
                seen.setdefault(key, set()).add(digest_weights(weights))
            if slot < own:
                key = (dist.get_process_group_ranks(group)[0], self.refreshes, slots._index, name_place(group.rank(), slot))
                self.homes.setdefault(key, set()).add(digest_weights(weights))

    def end_step(self, balancer: Any) -> None:
        """Note what the balancer says of a step, and what was sent in it."""
        self.said.append(balancer.figures.all)
        is_counted = balancer.layers is not None and balancer.layers.is_leader
        self.sent.append(self.sending if is_counted else 0)
        self.sending = 0

    def see_loan(self, slots: Any, loan: Any, *_: Any) -> None:
        """Note the bits of the just-in-time clones that compute next on this rank, in a forward or a backward."""
        self.backwards += is_in_backward()
        for one in loan.lent:
            if one.clone_rank == slots._rank:
                key = (slots._peers[0], self.refreshes, loan.layer, name_place(one.home_rank, one.home))
                layer = slots._layers[loan.layer]
                module = getattr(layer.shared_packing, "_clones", None)
                weights = list_computed(module, one.clone, list(layer.shared[one.clone]), is_cached=True)
                self.clones.setdefault(key, set()).add(digest_weights(weights))


def name_place(rank: int, place: int) -> int:
    """Return a number below 0 for a home slot, beside those of experts."""
    return -1 - place - 1000 * rank


def list_computed(experts: Any, place: int, weights: list[torch.nn.Parameter], *, is_cached: bool) -> list[torch.Tensor]:
    """Return what an expert computes with: its ``weights``, or under FP8 what is in its module's cache.

    Unless ``is_cached``, weights are quantized anew instead: what a clone has in its cache has to be that of its home.
    """
    from counterflow.megatron.experts.packing import list_tensors

    named = list_tensors(experts, place)
    # Before its first forward a module of clones in shared slots has a cache and no recipe yet.
    has_cache = is_cached and bool(named) and named[0][1] in getattr(named[0][0], "_fp8_workspaces", {})
    if not named or not (has_cache or getattr(named[0][0], "fp8", False)):
        return list(weights)
    forms = []
    for linear, name in named:
        if name.startswith("bias"):
            forms.append(getattr(linear, name))
            continue
        forms += list_buffers(linear._fp8_workspaces[name] if is_cached else quantize(linear, name, place))
    return forms


def quantize(linear: Any, name: str, place: int) -> Any:
    """Return a weight as its module would quantize it, in both directions."""
    quantizer = linear._get_weight_quantizers()[place].copy()
    quantizer.set_usage(rowwise=True, columnwise=True)
    quantizer.internal = False
    return quantizer(getattr(linear, name).detach())


def list_buffers(form: Any) -> list[torch.Tensor]:
    """Return data and scales of a quantized tensor, without what pads the scales of columns: that is not filled."""
    buffers = {name: part for name, part in vars(form).items() if torch.is_tensor(part)}
    if "Blockwise" in type(form).__name__:
        high, wide = (-(-size // 128) for size in form._columnwise_data.shape)
        buffers["_columnwise_scale_inv"] = form._columnwise_scale_inv[:high, :wide]
    return list(buffers.values())


def digest_weights(weights: list[torch.Tensor]) -> str:
    """Return a digest of an expert's bits."""
    parts = [weight.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes() for weight in weights]
    return hashlib.sha1(b"".join(parts)).hexdigest()


def sum_up(watches: list[Watch]) -> dict[str, Any]:
    """Return a case's numbers: how many clones ``computed``, ``wrong`` of them with other bits than their homes, and the rest.

    ``sent`` has for each step the just-in-time clones whose weights were sent, over all ranks.
    """
    homes: dict[Key, set[str]] = {}
    for watch in watches:
        for key, bits in watch.homes.items():
            homes.setdefault(key, set()).update(bits)
    clones = [(key, bits) for watch in watches for key, bits in watch.clones.items()]
    last = watches[-1]
    return {
        "computed": len(clones),
        "wrong": sum(bits != homes.get(key) for key, bits in clones),
        "tokens": sum(watch.clone_tokens for watch in watches),
        "placements": len(last.placements),
        "changes": sum(one != other for one, other in zip(last.placements, last.placements[1:], strict=False)),
        "said": last.said,
        "sent": [sum(step) for step in zip(*(watch.sent for watch in watches), strict=True)],
        "loans": len(last.loans),
        "plans": last.plans,
        "different_loans": len(set(last.loans)),
        "backwards": sum(watch.backwards for watch in watches),
    }


class Drawer:
    """Draws placements in place of `plan_next`: valid, seeded, never twice the same in a row."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(
        self, forecasts: Array, placement: Placement, microbatches: int, traffic_weight: float, costs: Any = None
    ) -> Placement:
        """Return a placement with clones anywhere but on a rank that has the expert."""
        while planning.has_clone_slots(placement):
            drawn = placement.experts.copy()
            assert placement.homes is not None
            for held, homes in zip(drawn, placement.homes, strict=True):
                self._draw_layer(held, homes, placement.cluster.rank_start)
            if (drawn != placement.experts).any():
                return Placement(placement.cluster, drawn, placement.homes)
        return placement

    def _draw_layer(self, held: Array, homes: Array, rank_start: Array) -> None:
        for begin, end in zip(rank_start, rank_start[1:], strict=False):
            spare = np.setdiff1d(np.arange(begin, end), homes)
            others = np.flatnonzero((homes < begin) | (homes >= end))
            held[spare] = self._random.permutation(others)[: len(spare)]
            held[spare[self._random.random(len(spare)) < EMPTY_SHARE]] = EMPTY


class HomeDrawer:
    """Draws homes in place of `plan_homes`: those at one place of all ranks change places."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, forecasts: Array, placement: Placement, horizon: int, traffic_weight: float = 0.0) -> Any:
        """Return what has the drawn ``placement``, without clones."""
        assert placement.homes is not None
        width = placement.cluster.slots_per_rank[0]
        homes = placement.homes.copy()
        for row in homes:
            for place in set((row % width).tolist()):
                there = np.flatnonzero(row % width == place)
                row[there] = self._random.permutation(row[there])
        return SimpleNamespace(placement=Placement(placement.cluster, place_homes(homes, placement), homes))


def place_homes(homes: Array, placement: Placement) -> Array:
    """Return ``int64[layers, slots]`` with the experts at these homes alone."""
    experts = np.full_like(placement.experts, EMPTY)
    np.put_along_axis(experts, homes, np.broadcast_to(np.arange(homes.shape[1]), homes.shape), 1)
    return experts


@contextmanager
def watch_case(case: dict[str, Any]) -> Iterator[Watch]:
    """Draw placements, watch experts and placements, and kill a rank where the case wants it, inside the block."""
    from megatron.core.transformer.moe.router import TopKRouter

    from counterflow.megatron.experts.balanced_model import BalancedModel
    from counterflow.megatron.experts.balancing import ExpertBalancer
    from counterflow.megatron.experts.layer import MegatronSlots
    from counterflow.moe.clones import Clones

    watch, patches = Watch(), Patches()
    plans = case.get("plans", "drawn")
    if plans != "made":
        patches.set(planning, "plan_next", Drawer(case.get("seed", 1)))
        patches.set(planning, "plan_homes", HomeDrawer(case.get("seed", 1)))
        patches.set(moe_layer, "plan_exact", LoanDrawer(case.get("seed", 1), stays=plans == "lasting"))

    def note(target: Any, name: str, before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
        patches.set(target, name, surround(getattr(target, name), before, after))

    def begin_step(*_: Any) -> None:
        watch.steps += 1
        watch.is_planning = True

    def end_planning(*_: Any) -> None:
        watch.is_planning = False

    def count_refresh(_: Any) -> None:
        watch.refreshes += 1

    def note_placement(_: Any, placement: Placement) -> None:
        # The first one has homes alone; while a checkpoint is saved, homes are in order.
        if watch.is_planning or not watch.placements:
            watch.placements.append(hashlib.sha1(placement.experts.tobytes()).hexdigest())

    def note_loan(_: Any, layer: int, placement: Placement, *__: Any) -> None:
        watch.loans.append(f"{layer} {placement.experts.tolist()}")

    def count_sent(_: Any, loan: Any, *__: Any) -> None:
        watch.sending += len(loan.lent)

    def count_plan(*_: Any) -> None:
        watch.plans += 1

    note(JustInTime, "lend", note_loan, None)
    note(JustInTime, "_start_sending", count_sent, None)
    note(moe_layer, "plan_exact", count_plan, None)

    def kill_self(*_: Any) -> None:
        if kill["rank"] == dist.get_rank() and kill["step"] == watch.steps:
            os.kill(os.getpid(), signal.SIGKILL)

    note(BalancedModel, "begin_step", begin_step, end_planning)
    note(BalancedModel, "refresh", count_refresh, None)
    note(BalancedModel, "_place", note_placement, None)
    note(ExpertBalancer, "end_step", None, lambda balancer, *_: watch.end_step(balancer))
    # Weights do not change inside a forward; behind it, gathers of parameters have ended too.
    note(
        MegatronSlots,
        "run_experts",
        None,
        lambda slots, run, tokens, tokens_per_slot, *_: watch.see_experts(slots, tokens_per_slot),
    )
    if (shunned := case.get("shunned")) is not None:
        patches.set(TopKRouter, "gating", shun(TopKRouter.gating, shunned))
    note(JustInTime, "receive", None, watch.see_loan)
    if (kill := case.get("kill")) is not None:
        owner = next(one for one in (Clones, BalancedModel, JustInTime) if hasattr(one, kill["method"]))
        note(owner, kill["method"], None, kill_self)
    try:
        yield watch
    finally:
        patches.undo()


def shun(gating: Callable[..., Any], experts: list[int]) -> Callable[..., Any]:
    """Return a router's ``gating`` that gives some experts the least score there is."""

    @wraps(gating)
    def run(*args: Any, **kwargs: Any) -> Any:
        logits = gating(*args, **kwargs)
        return logits.index_fill(-1, torch.tensor(experts), -1e4)

    return run


def surround(function: Callable[..., Any], before: Callable[..., None] | None, after: Callable[..., None] | None) -> Any:
    """Return ``function`` with calls of the others, by the same arguments, around it."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = function(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    return run


def run(job: dict[str, Any]) -> None:
    """Run the job's case; what was seen of clones on all ranks is in the result."""
    worker.prepare_writer(job["case"])
    with watch_case(job["case"]) as watch:
        result = worker.run_case(job["case"])
    watches: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(watches, watch)
    worker.write_result(job, {**result, "clones": sum_up(watches)})
