"""The model chunks of a rank whose experts are balanced: their slots, clones, homes and loads, step by step."""

import socket
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from counterflow.balance.cluster import Array, Cluster
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, measure_balancedness, share_evenly, sum_by_rank
from counterflow.balance.planning import TRAFFIC_WEIGHT
from counterflow.balance.recorded import read_record, record_step
from counterflow.config import Options
from counterflow.errors import BalanceError
from counterflow.megatron.experts import LayerSlots
from counterflow.megatron.optimizer_state import take_state
from counterflow.moe.clones import Clones, Traffic, find_timeout, measure_clones
from counterflow.moe.homes import move_homes
from counterflow.moe.loads import LoadTracker
from counterflow.moe.planning import ClonePlanner

# Micro-batches whose loads a checkpoint keeps, so that the next run starts with a plan: as many as the predictor looks back.
KEPT_MICROBATCHES = 64


class BalancedModel:
    """One rank's MoE layers, one or more; its ``stage`` are the ranks that hold the same ones.

    ``optimizer`` has to be set before homes can move.
    """

    def __init__(self, options: Options, chunks: list[Any]) -> None:
        self._options, self._chunks = options, chunks
        slots = [[module.cf_slots for module in chunk.modules() if hasattr(module, "cf_slots")] for chunk in chunks]
        self._layers: list[LayerSlots] = [one for chunk in slots for one in chunk]
        self._experts = [one.list_experts() for one in self._layers]
        self._device = torch.device(torch.cuda.current_device())
        self._stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self.is_leader = self._stage.rank() == 0
        layer = self._layers[0].layer
        self._sources = layer.token_dispatcher.tp_ep_group
        self._group = open_group(layer.ep_group)
        # Homes where Megatron puts them, which checkpoints need.
        self._straight = self._placement = self._make_placement()
        self._held = self._placement.experts.copy()
        self._are_stale = False
        self.optimizer: Any = None
        self.traffic = Traffic()
        self._tracker = LoadTracker(len(self._layers))
        self._clones = self._make_clones(slots)
        self._planner = ClonePlanner(
            self._placement,
            self._stage,
            self._device,
            options.eplb_interval,
            options.eplb_rehome_interval,
            0.0 if options.eplb_policy == "global" else TRAFFIC_WEIGHT,
        )
        # Since the last plan: steps, lines and loads of those not yet summed over replicas, loads of those that are.
        self._steps = 0
        self._own: list[tuple[dict[str, Any], Array]] = []
        self._summed: list[Array] = []
        self._step: int | None = None
        self._is_again = False
        self._recent: deque[Array] = deque(maxlen=KEPT_MICROBATCHES)
        self._last: dict[str, Any] = {}
        self._place(self._placement)

    def _make_placement(self) -> Placement:
        layer, clones = self._layers[0].layer, self._options.eplb_clones_per_rank
        cluster = _agree_on_cluster(layer.ep_group, layer.num_local_experts + clones, self._stage, self._device)
        homes = make_home_placement(len(self._layers), layer.config.num_moe_experts, cluster.ranks, clones)
        return Placement(cluster, homes.experts, homes.homes)

    def _make_clones(self, slots: list[list[LayerSlots]]) -> list[Clones]:
        made, first = [], 0
        for chunk, layers in zip(self._chunks, slots, strict=True):
            if layers:
                experts = self._experts[first : first + len(layers)]
                clones = Clones(experts, first, self._placement.cluster, self._group, self.traffic)
                for index, one in enumerate(layers):
                    one.connect(self._tracker, first + index, clones, index)
                # A model that is only evaluated (--skip-train) has no data parallelism around it.
                if hasattr(chunk, "expert_parallel_bucket_groups"):
                    hold_reductions(chunk, clones)
                made.append(clones)
            first += len(layers)
        return made

    def measure_memory(self) -> tuple[int, int, int]:
        """Return the number of layers, and the bytes of their clones' weights and gradients on this rank."""
        return len(self._layers), *measure_clones(self._experts)

    def _place(self, placement: Placement) -> None:
        assert placement.homes is not None
        self._placement = placement
        for index, one in enumerate(self._layers):
            rows = slice(index, index + 1)
            one.hold(Placement(placement.cluster, placement.experts[rows], placement.homes[rows]), self._device)

    def begin_step(self, step: int) -> None:
        """Take the plan that is due, and start filling clones.

        A step that Megatron runs again, to compare results bit by bit, keeps its placement.
        """
        self._tracker.forget()
        self._is_again, self._step = step == self._step, step
        if not self._is_again and (planned := self._planner.take()) is not None:
            self.traffic.homes += self._move_homes(planned)
            self._place(planned)
        self.refresh()
        for clones in self._clones:
            clones.expect_gradients()

    def refresh(self) -> None:
        """Start sending weights to the clones that have none, or those from before the last optimizer step."""
        experts = self._placement.experts
        is_new = experts != self._held
        wanted = (experts != EMPTY) & (is_new | self._are_stale)
        assert self._placement.homes is not None
        np.put_along_axis(wanted, self._placement.homes, False, 1)
        self.traffic.clones += int(wanted.sum())
        self.traffic.moved += int((wanted & is_new).sum())
        if wanted.any():
            self._finish_parameter_gathers()
        for clones in self._clones:
            clones.refresh(self._placement, wanted)
        self._held, self._are_stale = experts.copy(), False

    def finish_evaluation(self) -> None:
        """Wait for weights that evaluation did not use: what comes next may change homes, or send to the same slots."""
        for clones in self._clones:
            clones.finish_transfers()

    def end_step(self, microbatches: int) -> tuple[Array, Array]:
        """Sum up a step, and start to plan after the last one of an interval; the optimizer changes the homes next.

        Returns the balancedness ``[micro-batches, layers]`` of this expert-parallel group with homes alone, and as it was.
        """
        for clones in self._clones:
            clones.finish_step()
        self._are_stale = True
        loads = self._tracker.take(microbatches, self._sources)
        before, after = self._measure(loads.experts, loads.ranks)
        if not self._is_again:
            self._steps += 1
            self._own.append((self._describe_step(microbatches, before, after), loads.experts))
        is_last = self._steps == self._options.eplb_interval
        if is_last or self._options.record is not None:
            self._sum_replicas()
        if is_last:
            self._planner.start(np.concatenate(self._summed), microbatches, self._placement)
            self._summed, self._steps = [], 0
        return before, after

    def _measure(self, experts: Array, ranks: Array | None) -> tuple[Array, Array]:
        assert self._placement.homes is not None
        cluster, layers = self._placement.cluster, np.arange(len(self._layers))[:, None]
        at_home = np.zeros((*experts.shape[:2], cluster.slots), np.int64)
        at_home[:, layers, self._placement.homes] = experts
        if ranks is None:
            ranks = np.stack([sum_by_rank(share_evenly(seen, self._placement), cluster) for seen in experts])
        return measure_balancedness(sum_by_rank(at_home, cluster)), measure_balancedness(ranks)

    def _sum_replicas(self) -> None:
        """Sum loads over the replicas of the experts, and write them down with their steps' lines."""
        if not self._own:
            return
        counts = torch.from_numpy(np.concatenate([own for _, own in self._own])).to(self._device)
        dist.all_reduce(counts, group=parallel_state.get_expert_data_parallel_group())
        ends = np.cumsum([len(own) for _, own in self._own])
        for (line, _), summed in zip(self._own, np.split(counts.cpu().numpy(), ends[:-1]), strict=True):
            self._summed.append(summed)
            if self.is_leader:
                if self._options.record is not None:
                    _record(self._options.record, summed, line)
                self._recent.extend(summed)
                self._last = line
        self._own.clear()

    def _describe_step(self, microbatches: int, before: Array, after: Array) -> dict[str, Any]:
        """Return the step's line in the record (`counterflow.balance.recorded`)."""
        traffic = self.traffic
        return {
            "step": self._step,
            "layers": [one.number for one in self._layers],
            "ranks": self._placement.cluster.ranks,
            "clones_per_rank": self._options.eplb_clones_per_rank,
            "microbatches": microbatches,
            "balancedness_before": before.mean(0),
            "balancedness_after": after.mean(0),
            "experts": self._placement.experts,
            "homes": self._placement.homes,
            "clones": traffic.clones,
            "moved": traffic.moved,
            "homes_moved": traffic.homes,
            "bytes": traffic.bytes,
            "weights_ms": traffic.weights * 1e3,
            "gradients_ms": traffic.gradients * 1e3,
            "waited_ms": traffic.waited * 1e3,
        }

    def save_loads(self, directory: Path) -> None:
        """Keep the last loads beside a checkpoint, as a record of their own; where that fails, say so and go on."""
        if self.is_leader and self._recent:
            counts = np.stack(self._recent)
            try:
                for old in directory.glob(f"*-rank{dist.get_rank():05d}.*"):
                    old.unlink()
                record_step(directory, dist.get_rank(), counts, {**self._last, "microbatches": len(counts)})
            except (OSError, BalanceError) as error:
                print(
                    f"counterflow: eplb: loads are not kept, a run from {directory.parent} begins without clones: {error}",
                    flush=True,
                )

    def load_loads(self, directory: Path | None, microbatches: int) -> None:
        """Plan the first step from the loads kept beside the checkpoint that the run starts from, where there are any."""
        counts = self._read_loads(directory) if self.is_leader and directory is not None and directory.is_dir() else None
        self._planner.resume(counts, microbatches, self._placement)

    def _read_loads(self, directory: Path) -> Array | None:
        try:
            record = read_record(directory)
            numbers = [one.number for one in self._layers]
            if record.experts == self._layers[0].layer.config.num_moe_experts and set(numbers) <= set(record.layers.tolist()):
                counts: Array = record.counts[:, np.searchsorted(record.layers, numbers)]
                return counts
            reason = f"its layers {record.layers.tolist()} of {record.experts} experts are not this model's"
        except BalanceError as error:
            reason = str(error)
        print(f"counterflow: eplb: the loads in {directory} are not used, the first step has no clones: {reason}", flush=True)
        return None

    def bring_homes_back(self) -> Placement | None:
        """Let every expert live where Megatron puts it, as checkpoints need it; return what to restore, None for nothing."""
        before = self._placement
        assert before.homes is not None and self._straight.homes is not None
        if (before.homes == self._straight.homes).all():
            return None
        self._move_homes(self._straight)
        self._place(self._straight)
        return before

    def restore_homes(self, placement: Placement) -> None:
        """Put homes, and what slots held, back to what `bring_homes_back` returned."""
        self._move_homes(placement)
        self._place(placement)

    def _move_homes(self, new: Placement) -> int:
        """Move homes, with masters and moments, to where ``new`` has them; return how many. Clones hold the same weights."""
        assert self._placement.homes is not None and new.homes is not None
        if (self._placement.homes == new.homes).all():
            return 0
        self._finish_parameter_gathers()
        with torch.no_grad():
            return move_homes(self._placement, new, self._group, self._take_home, self._put_home)

    def _take_home(self, layer: int, place: int) -> list[torch.Tensor]:
        parameters = self._experts[layer].homes[place]
        return [tensor for p in parameters for tensor in (p.data, *take_state(self.optimizer, p))]

    def _put_home(self, layer: int, place: int, arrived: list[torch.Tensor]) -> None:
        for tensor, other in zip(self._take_home(layer, place), arrived, strict=True):
            tensor.copy_(other)

    def _finish_parameter_gathers(self) -> None:
        """Wait for the expert weights that ``--overlap-param-gather`` would gather behind the forward passes."""
        for chunk in self._chunks:
            # No hooks: nothing is under way, as before the first step and while the model is evaluated.
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                for group in chunk.expert_parallel_bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)


def _record(directory: Path, counts: Array, line: dict[str, Any]) -> None:
    try:
        record_step(directory, dist.get_rank(), counts, line)
    except OSError as error:
        raise BalanceError(f"--cf-record {directory}: {error}; allowed: a folder that can be written and has room") from None


def _agree_on_cluster(ep_group: Any, width: int, stage: Any, device: torch.device) -> Cluster:
    """Return the expert-parallel ranks with ``width`` slots each, on the nodes where the stage's first rank has them."""
    hosts: list[Any] = [None] * ep_group.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=ep_group)
    said = torch.from_numpy(np.unique(hosts, return_inverse=True)[1]).to(device)
    dist.broadcast(said, dist.get_process_group_ranks(stage)[0], group=stage)
    return Cluster((width,) * ep_group.size(), tuple(said.tolist()))


def open_group(ep_group: Any) -> dist.ProcessGroup:
    """Return a group of the expert-parallel ranks for the clones alone, which waits as long as Megatron's own.

    Every rank of the run has to open one, also where it has no clones: torch names the groups that are opened later, as some
    checkpoints do, by how many a rank has opened before.
    """
    ranks = dist.get_process_group_ranks(ep_group)
    group = dist.new_group(ranks, find_timeout(ep_group), use_local_synchronization=True, group_desc="CF_CLONES")
    assert isinstance(group, dist.ProcessGroup)
    # A group's first batch of transfers may need all its ranks, and not all of them send to each other.
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
