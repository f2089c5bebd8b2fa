"""``--cf-eplb`` through a training step: placements, the clones' traffic around Megatron's own calls, and what was measured.

forward_backward   take the plan, start sending weights to clones          (the pipeline's first bubbles)
  F, B, W …        tokens are dealt to slots, loads are counted
  last gradients   a chunk's clones start sending their gradients home     (its last bubbles)
finish_grad_sync   they are added at the homes, then upstream reduces
forward_backward   ends: loads are summed, the next plan is started        (beside the optimizer step)
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from counterflow.balance.cluster import Array, Cluster
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, measure_balancedness, share_evenly, sum_by_rank
from counterflow.balance.planning import TRAFFIC_WEIGHT
from counterflow.config import Options
from counterflow.megatron.experts import LayerSlots
from counterflow.moe.clones import Clones, Traffic, measure_clones
from counterflow.moe.loads import LoadTracker
from counterflow.moe.planning import ClonePlanner, compile_planner


class ExpertBalancer:
    """Balances the experts of the model that is trained; made once, attached at its first step."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._model: _BalancedModel | None = None

    def wrap(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """Return Megatron's ``forward_backward`` function with balancing around it."""

        @wraps(forward_backward)
        def balanced_forward_backward(*args: Any, **kwargs: Any) -> Any:
            chunks = kwargs["model"] if isinstance(kwargs["model"], list) else [kwargs["model"]]
            if self._model is None:
                self._model = _BalancedModel(self._options, chunks)
            if kwargs.get("forward_only", False):
                self._model.refresh()
                return forward_backward(*args, **kwargs)
            self._model.begin_step()
            result = forward_backward(*args, **kwargs)
            self._model.end_step(kwargs["num_microbatches"])
            return result

        return balanced_forward_backward

    def add_to_report(self, report: Callable[..., str]) -> Callable[..., str]:
        """Wrap Megatron's report of MoE metrics: what it returns is part of the log line, its ``writer`` is TensorBoard's."""

        @wraps(report)
        def report_and_add(*args: Any, **kwargs: Any) -> str:
            line = report(*args, **kwargs)
            if self._model is None or self._model.said is None:
                return line
            if (writer := kwargs.get("writer")) is not None:
                for name, value in self._model.said.items():
                    writer.add_scalar(f"eplb/{name}", value, kwargs["iteration"])
            return line + _describe_step(self._model.said)

        return report_and_add


def _describe_step(said: dict[str, float]) -> str:
    return (
        f" balancedness: {said['balancedness before']:.4f} -> {said['balancedness']:.4f} |"
        f" clones: {said['clones']:.0f}, {said['clones moved']:.0f} moved, {said['MB sent']:.2f} MB,"
        f" {said['ms waited']:.1f} ms waited |"
    )


class _BalancedModel:
    """The model chunks of this rank: their layers' slots, clones and loads."""

    def __init__(self, options: Options, chunks: list[Any]) -> None:
        self._options = options
        self._chunks = chunks
        self._slots = [[m.cf_slots for m in chunk.modules() if hasattr(m, "cf_slots")] for chunk in chunks]
        self._layers: list[LayerSlots] = [slots for chunk in self._slots for slots in chunk]
        self._traffic = Traffic()
        self._clones: list[Clones] = []
        self._device = torch.device(torch.cuda.current_device())
        self._stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._is_stale = False
        self.said: dict[str, float] | None = None
        """What the last step has to say for itself, of the whole model."""
        compile_planner()
        if self._layers:
            self._attach()
        self._announce()

    def _attach(self) -> None:
        layer = self._layers[0].layer
        clones = self._options.eplb_clones_per_rank
        cluster = _agree_on_cluster(layer.ep_group, layer.num_local_experts + clones, self._stage, self._device)
        homes = make_home_placement(len(self._layers), layer.config.num_moe_experts, cluster.ranks, clones)
        self._placement = Placement(cluster, homes.experts, homes.homes)
        self._sources = layer.token_dispatcher.tp_ep_group
        self._tracker = LoadTracker(len(self._layers))
        weight = 0.0 if self._options.eplb_policy == "global" else TRAFFIC_WEIGHT
        self._planner = ClonePlanner(self._placement, self._stage, self._device, self._options.eplb_interval, weight)
        self._kept: list[Array] = []
        group = _open_group(layer.ep_group, self._device)
        first = 0
        for chunk, slots in zip(self._chunks, self._slots, strict=True):
            # Weights of a layer without clones (re-homing alone) have nowhere to go.
            if slots:
                made = Clones([one.list_experts() for one in slots], first, cluster, group, self._traffic)
                self._clones.append(made)
                for index, one in enumerate(slots):
                    one.connect(self._tracker, first + index, made, index)
                if hasattr(chunk, "finish_grad_sync"):
                    hold_reductions(chunk, made)
            first += len(slots)
        self._held = self._placement.experts.copy()
        self._place(self._placement)

    def _announce(self) -> None:
        """Say what the clones take, as much as on any rank."""
        experts = [one.list_experts() for one in self._layers]
        weights, gradients = measure_clones(experts)
        numbers = torch.tensor([len(self._layers), weights, gradients], dtype=torch.int64, device=self._device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        layers, weights, gradients = numbers.tolist()
        if dist.get_rank() == 0:
            count = self._options.eplb_clones_per_rank
            print(
                f"counterflow: eplb: {count} clone{'s' if count != 1 else ''} per rank and MoE layer; on a rank of {layers} MoE "
                f"layers {weights:,} bytes of weights and {gradients:,} bytes of gradients, no optimizer state",
                flush=True,
            )

    def _place(self, placement: Placement) -> None:
        self._placement = placement
        for index, one in enumerate(self._layers):
            assert placement.homes is not None
            rows = slice(index, index + 1)
            one.hold(Placement(placement.cluster, placement.experts[rows], placement.homes[rows]), self._device)

    def begin_step(self) -> None:
        """Take the plan that is due, and start filling clones."""
        if not self._layers:
            return
        self._tracker.forget()
        if (planned := self._planner.take()) is not None:
            self._place(planned)
        self.refresh()
        for clones in self._clones:
            clones.expect_gradients()

    def refresh(self) -> None:
        """Send weights to the clones that have none, or those from before the last optimizer step."""
        if not self._layers:
            return
        experts = self._placement.experts
        is_new = experts != self._held
        wanted = (experts != EMPTY) & (is_new | self._is_stale)
        assert self._placement.homes is not None
        np.put_along_axis(wanted, self._placement.homes, False, 1)
        self._traffic.clones += int(wanted.sum())
        self._traffic.moved += int((wanted & is_new).sum())
        if wanted.any():
            for chunk in self._chunks:
                finish_parameter_gathers(chunk)
        for clones in self._clones:
            clones.refresh(self._placement, wanted)
        self._held, self._is_stale = experts.copy(), False

    def end_step(self, microbatches: int) -> None:
        """Sum up the step; after the last one of an interval, start to plan. The optimizer changes the homes next."""
        self._is_stale = True
        said = np.zeros(7)
        if self._layers:
            for clones in self._clones:
                clones.finish_step()
            loads = self._tracker.take(microbatches, self._sources)
            before, after = self._measure(loads.experts, loads.ranks)
            self._kept.append(loads.experts)
            if len(self._kept) == self._options.eplb_interval:
                self._start_plan(microbatches)
            said[:3] = before.sum(), after.sum(), before.size
            if self._stage.rank() == 0:
                said[3:5] = self._traffic.clones, self._traffic.moved
            said[5:] = self._traffic.bytes, self._traffic.waited
            self._traffic.reset()
        self._sum_up(said)

    def _measure(self, experts: Array, ranks: Array | None) -> tuple[Array, Array]:
        """Return the balancedness ``[micro-batches, layers]`` with homes alone, and as it was."""
        assert self._placement.homes is not None
        cluster, layers = self._placement.cluster, np.arange(len(self._layers))[:, None]
        at_home = np.zeros((*experts.shape[:2], cluster.slots), np.int64)
        at_home[:, layers, self._placement.homes] = experts
        if ranks is None:
            ranks = np.stack([sum_by_rank(share_evenly(seen, self._placement), cluster) for seen in experts])
        return measure_balancedness(sum_by_rank(at_home, cluster)), measure_balancedness(ranks)

    def _start_plan(self, microbatches: int) -> None:
        counts = torch.from_numpy(np.concatenate(self._kept)).to(self._device)
        self._kept.clear()
        # The replicas of an expert-parallel group split their own tokens; they are planned for together.
        dist.all_reduce(counts, group=parallel_state.get_expert_data_parallel_group())
        self._planner.start(counts.cpu().numpy(), microbatches, self._placement)

    def _sum_up(self, said: Array) -> None:
        numbers = torch.from_numpy(said).to(self._device)
        dist.all_reduce(numbers)
        before, after, cells, sent, moved, size, waited = numbers.tolist()
        self.said = {
            "balancedness before": before / max(cells, 1),
            "balancedness": after / max(cells, 1),
            "clones": sent,
            "clones moved": moved,
            "MB sent": size / 1e6,
            "ms waited": waited / dist.get_world_size() * 1e3,
        }


def _agree_on_cluster(ep_group: Any, width: int, stage: Any, device: torch.device) -> Cluster:
    """Return the expert-parallel ranks with ``width`` slots each, on the nodes where the stage's first rank has them."""
    per_node = torch.cuda.device_count() if device.type == "cuda" else dist.get_world_size()
    nodes = np.array(dist.get_process_group_ranks(ep_group)) // max(1, per_node)
    said = torch.from_numpy(np.unique(nodes, return_inverse=True)[1]).to(device)
    dist.broadcast(said, dist.get_process_group_ranks(stage)[0], group=stage)
    return Cluster((width,) * ep_group.size(), tuple(said.tolist()))


def _open_group(ep_group: Any, device: torch.device) -> Any:
    """Return a group of the expert-parallel ranks for the clones alone, which waits as long as Megatron's own."""
    timeout = ep_group._get_backend(device).options._timeout
    ranks = dist.get_process_group_ranks(ep_group)
    group = dist.new_group(ranks, timeout, use_local_synchronization=True, group_desc="CF_CLONES")
    # A group's first batch of transfers may need all its ranks, and not all of them send to each other.
    assert isinstance(group, dist.ProcessGroup)
    dist.barrier(group=group)
    return group


def hold_reductions(chunk: Any, clones: Clones) -> None:
    """Let Megatron's data parallelism reduce expert gradients once those of the clones are home."""
    due: list[Callable[[], None]] = []
    finish = chunk.finish_grad_sync

    def hold(start: Callable[..., None]) -> Callable[..., None]:
        @wraps(start)
        def start_when_home(*args: Any, **kwargs: Any) -> None:
            if clones.are_home:
                start(*args, **kwargs)
            else:
                due.append(partial(start, *args, **kwargs))

        return start_when_home

    @wraps(finish)
    def finish_grad_sync(*args: Any, **kwargs: Any) -> None:
        clones.finish_homecoming()
        while due:
            due.pop(0)()
        finish(*args, **kwargs)

    chunk.finish_grad_sync = finish_grad_sync
    # For schedules that know a chunk's last gradients before they finish: `gradient_sync.GradientSync`.
    chunk.cf_send_gradients_home = clones.start_homecoming
    for group in chunk.expert_parallel_bucket_groups:
        group.start_grad_sync = hold(group.start_grad_sync)


def finish_parameter_gathers(chunk: Any) -> None:
    """Wait for the expert weights that ``--overlap-param-gather`` would gather behind the forward passes."""
    # No hooks: nothing is under way, as before the first step and while the model is evaluated.
    if getattr(chunk, "remove_forward_pre_hook_handles", None):
        for group in chunk.expert_parallel_bucket_groups:
            group.finish_param_sync(skip_next_bucket_dispatch=True)
