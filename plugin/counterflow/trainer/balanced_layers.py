"""Balance the experts of one rank's model chunks: slots, clones, homes and loads, step by step."""

import re
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.costs import Costs
from counterflow.balance.exact import FREE
from counterflow.balance.files.costs import read_costs
from counterflow.balance.files.recorded import describe_change, read_record, record_step
from counterflow.balance.placement import EMPTY, Placement, make_home_placement, measure_balancedness, share_evenly, sum_by_rank
from counterflow.balance.planning import TRAFFIC_WEIGHT
from counterflow.devices import find_device
from counterflow.errors import BalanceError
from counterflow.moe.clones import Clones, Traffic, measure_clones, open_group
from counterflow.moe.gradients import GradientStore, Weight, find_values
from counterflow.moe.homes import move_homes
from counterflow.moe.just_in_time import JustInTime
from counterflow.moe.layer import LayerSlots
from counterflow.moe.loads import TIERS, Loads, LoadTracker, sum_by_tier
from counterflow.moe.planning import ClonePlanner, HomeGate, HomeInterval, clear_clones
from counterflow.options import AUTO, PREDICTED, Options
from counterflow.runtime.weight_grads import defer_weight_grad

# The number of micro-batches whose loads are saved with a checkpoint, so that the next run starts with a plan. The predictor
# looks back as far.
KEPT_MICROBATCHES = 64
# Of balancedness in records.
DIGITS = 5


@dataclass(frozen=True)
class ExpertGroups:
    """The process groups of one rank's experts.

    The ranks of ``experts`` hold every expert once: equally many on each rank, in the order of ranks. ``sources`` has the ranks
    whose tokens are split together over these experts, ``replicas`` the ranks that hold the same experts, and ``stage`` the ranks
    that hold the same layers.
    """

    experts: dist.ProcessGroup
    sources: dist.ProcessGroup
    replicas: dist.ProcessGroup
    stage: dist.ProcessGroup


class StepLoads(NamedTuple):
    """What one expert-parallel group computed in a step.

    ``before`` and ``after``, ``float64[micro-batches, layers]``, are balancedness with homes alone and with the clones of the
    step. ``tiers``, ``int64[3]``, are the tokens of each of `counterflow.moe.loads.TIERS`.
    """

    before: Array
    after: Array
    tiers: Array


class BalancedLayers:
    """One rank's MoE layers, at least one: for each chunk, in the order in which a forward runs them.

    An adapter calls `begin_step` before the first F of a training step, and `end_step` after its last weight gradients and before
    the optimizer step. If homes may move, it overrides `take_state`.
    """

    def __init__(
        self, options: Options, layers: Sequence[Sequence[LayerSlots]], groups: ExpertGroups, gradients: GradientStore
    ) -> None:
        if not options.needs_moves and type(self).take_state is BalancedLayers.take_state:
            options = options.keep_homes()
        self._options, self._groups, self._gradients = options, groups, gradients
        self._layers = [one for chunk in layers for one in chunk]
        self._experts = [one.list_experts() for one in self._layers]
        self._own = len(self._experts[0].homes)
        self.number_of_experts = self._own * groups.experts.size()
        self._device = find_device()
        self.is_leader = groups.stage.rank() == 0
        self._group = open_group(groups.experts)
        # The placement with homes where the trainer puts them, as checkpoints need it.
        self._straight = self._placement = self._make_placement()
        self._held = self._placement.experts.copy()
        self._are_stale = False
        self.traffic = Traffic()
        self.measured: tuple[float, float] | None = None
        """Seconds of this step's forward passes with as many tokens on every rank, and as routed, where they were measured."""
        self._tracker = LoadTracker(len(self._layers))
        self.just_in_time = self._make_just_in_time()
        self.clones = self._make_clones(layers)
        traffic_weight = 0.0 if options.eplb_policy == "global" else TRAFFIC_WEIGHT
        self._planner = ClonePlanner(
            self._placement,
            groups.stage,
            self._device,
            options.eplb_interval,
            traffic_weight,
            self._make_home_planner(traffic_weight),
            self._read_costs() if options.eplb_plan == AUTO else None,
        )
        # Since the last plan: the number of steps; record lines and loads not yet summed over replicas; summed loads.
        self._steps = 0
        self._unsummed: list[tuple[dict[str, Any], Array]] = []
        self._summed: list[Array] = []
        self._step: int | None = None
        self._is_again = False
        self._recent: deque[Array] = deque(maxlen=KEPT_MICROBATCHES)
        self._last: dict[str, Any] = {}
        self._recorded: Placement | None = None
        self._place(self._placement)

    def take_state(self, parameter: Weight) -> list[torch.Tensor]:
        """Return the optimizer's state of a home's parameter, which moves with it: in the same order on all ranks."""
        raise BalanceError("homes cannot move: this trainer does not say what its optimizer keeps, drop eplb_rehome_interval")

    def finish_gathers(self) -> None:
        """Wait for gathers of homes' weights before they are sent; most trainers have none."""

    def _make_placement(self) -> Placement:
        groups, clones = self._groups, self._options.predicted_clones
        cluster = _agree_on_cluster(groups.experts, self._own + clones, groups.stage, self._device)
        homes = make_home_placement(len(self._layers), self.number_of_experts, cluster.ranks, clones)
        return Placement(cluster, homes.experts, homes.homes)

    def _make_just_in_time(self) -> JustInTime | None:
        if not self._options.shared_clones:
            return None
        if len(self._experts[0].shared) != self._options.shared_clones:
            raise BalanceError(
                f"{self._options.shared_clones} shared slots a rank are asked for, and this trainer's layers have "
                f"{len(self._experts[0].shared)}: give eplb_plan predicted and eplb_buffers per-layer"
            )
        group = open_group(self._groups.experts, "CF_JUST_IN_TIME")
        made = JustInTime(
            self._experts,
            group,
            self.traffic,
            self._gradients,
            defer_weight_grad,
            pairs=self._options.overlap,
            keeps=self._options.eplb_backward == "keep",
        )
        prices = FREE if self._options.eplb_plan == "exact" else self._read_costs().price_clones(group.size())
        for one in self._layers:
            one.lend_by(made, prices)
        return made

    def _make_home_planner(self, traffic_weight: float) -> HomeGate | HomeInterval | None:
        options = self._options
        if options.eplb_rehome_interval == AUTO:
            lent = options.eplb_clones_per_rank if options.eplb_plan != PREDICTED else 0
            return HomeGate(traffic_weight, options.eplb_plan, lent, self._read_costs())
        steps = options.eplb_rehome_interval
        return HomeInterval(steps, traffic_weight) if isinstance(steps, int) else None

    def _read_costs(self) -> Costs:
        return read_costs(self._options.eplb_costs) if self._options.eplb_costs is not None else Costs()

    def _make_clones(self, layers: Sequence[Sequence[LayerSlots]]) -> list[Clones]:
        made, first = [], 0
        for chunk in filter(None, layers):
            experts = self._experts[first : first + len(chunk)]
            clones = Clones(
                experts, first, self._placement.cluster, self._group, self.traffic, self._gradients, defer_weight_grad
            )
            if self.just_in_time is not None:
                clones.finish_lent = self.just_in_time.finish_homecoming
            for index, one in enumerate(chunk):
                one.connect(self._tracker, first + index, clones, index)
            made.append(clones)
            first += len(chunk)
        return made

    @property
    def numbers(self) -> list[int]:
        """The layers' numbers in the model."""
        return [one.number for one in self._layers]

    def measure_memory(self) -> tuple[int, int, int]:
        """Return the number of layers, and the bytes of their clones' weights and gradients on this rank."""
        return len(self._layers), *measure_clones(self._experts, self._gradients)

    @property
    def shared_clones(self) -> int:
        """The number of clone slots on a rank that its layers share."""
        return self._options.shared_clones

    def measure_shared(self) -> tuple[int, int]:
        """Return the bytes of weights and gradients of the slots that all layers of this rank share."""
        return self.just_in_time.measure_memory() if self.just_in_time is not None else (0, 0)

    def measure_kept(self) -> int:
        """Return the bytes of weights that a micro-batch keeps on this rank from forward to backward, at most."""
        return self.just_in_time.measure_kept() if self.just_in_time is not None else 0

    def measure_packed(self) -> tuple[int, int]:
        """Return the bytes of FP8 data and scales among those of shared slots, and if each layer had such slots for itself."""
        return self.just_in_time.measure_packed() if self.just_in_time is not None else (0, 0)

    def measure_unshared(self) -> tuple[int, int]:
        """Return the bytes of weights and gradients if each layer of this rank had such slots for itself."""
        return self.just_in_time.measure_layers() if self.just_in_time is not None else (0, 0)

    def _place(self, placement: Placement) -> None:
        assert placement.homes is not None
        self._placement = placement
        for index, one in enumerate(self._layers):
            one.hold(take_layer(placement, index), self._device)

    def begin_step(self, step: int, microbatches: int | None = None) -> None:
        """Take the next plan if there is one, and start sending weights to clones.

        With the number of ``microbatches`` a layer's gradients go home as soon as they are complete. A step that the trainer runs
        a second time, to compare results bit by bit, keeps its placement.
        """
        self._tracker.forget()
        self._is_again, self._step = step == self._step, step
        if not self._is_again and (planned := self._planner.take()) is not None:
            self._follow_homes(planned)
            self._place(planned)
        self.refresh()
        for clones in self.clones:
            clones.expect_gradients(microbatches)
        for one in self._layers:
            one.begin_step()

    def refresh(self) -> None:
        """Start sending weights to new clones, and to all clones if the optimizer has changed the homes."""
        if self.just_in_time is not None:
            # Whatever has run a layer since the last step or evaluation: nothing that a slot holds is taken for today's weights.
            self.just_in_time.finish_step()
        experts = self._placement.experts
        is_new = experts != self._held
        wanted = (experts != EMPTY) & (is_new | self._are_stale)
        assert self._placement.homes is not None
        np.put_along_axis(wanted, self._placement.homes, False, 1)
        wanted &= self._options.layer_clones > 0
        self.traffic.clones += int(wanted.sum())
        self.traffic.moved += int((wanted & is_new).sum())
        if wanted.any() or self.just_in_time is not None:
            self.finish_gathers()
        # Resident clones in shared slots are sent as they are used.
        own = self._placement if self._options.layer_clones else clear_clones(self._placement)
        for clones in self.clones:
            clones.refresh(own, wanted)
        self._held, self._are_stale = experts.copy(), False

    def finish_evaluation(self) -> None:
        """Wait for transfers that the evaluation did not wait for: the next step may change homes or send to the same slots."""
        for clones in self.clones:
            clones.finish_transfers()
        if self.just_in_time is not None:
            self.just_in_time.finish_step()

    @contextmanager
    def measure(self, *, is_forced: bool) -> Iterator[None]:
        """Run forwards without gradients inside the block, uncounted; with ``is_forced`` all experts get as many tokens."""
        traffic = replace(self.traffic)
        for one in self._layers:
            one.is_forced = is_forced
        try:
            yield
        finally:
            self.finish_evaluation()
            for one in self._layers:
                one.is_forced = False
            vars(self.traffic).update(vars(traffic))

    def end_step(self, microbatches: int) -> StepLoads:
        """End a step: take its loads, and start to plan if it is the last of an interval."""
        for clones in self.clones:
            clones.finish_step()
        if self.just_in_time is not None:
            self.just_in_time.finish_step()
        self._are_stale = True
        loads = self._tracker.take(microbatches, self._groups.sources)
        step = self._measure(loads)
        if not self._is_again:
            self._steps += 1
            self._unsummed.append((self._describe_step(microbatches, step), loads.experts))
        is_last = self._steps == self._options.eplb_interval
        if is_last or self._options.record is not None:
            self._sum_replicas()
        if is_last:
            self._planner.start(np.concatenate(self._summed), microbatches, self._placement)
            self._summed, self._steps = [], 0
        return step

    def _measure(self, loads: Loads) -> StepLoads:
        assert self._placement.homes is not None
        cluster, layers = self._placement.cluster, np.arange(len(self._layers))[:, None]
        at_home = np.zeros((*loads.experts.shape[:2], cluster.slots), np.int64)
        at_home[:, layers, self._placement.homes] = loads.experts
        ranks, tiers = loads.ranks, loads.tiers
        if ranks is None or tiers is None:
            split = np.stack([share_evenly(seen, self._placement) for seen in loads.experts])
            held = [take_layer(self._placement, layer) for layer in range(len(self._layers))]
            ranks = sum_by_rank(split, cluster)
            tiers = np.stack([sum_by_tier(split[:, layer], one, one) for layer, one in enumerate(held)], 1)
        before, after = measure_balancedness(sum_by_rank(at_home, cluster)), measure_balancedness(ranks)
        return StepLoads(before, after, np.rint(tiers.sum((0, 1))).astype(np.int64))

    def _sum_replicas(self) -> None:
        """Sum loads over the replicas of the experts, and record them with the lines of their steps."""
        if not self._unsummed:
            return
        counts = torch.from_numpy(np.concatenate([own for _, own in self._unsummed])).to(self._device)
        dist.all_reduce(counts, group=self._groups.replicas)
        ends = np.cumsum([len(own) for _, own in self._unsummed])
        for (line, _), summed in zip(self._unsummed, np.split(counts.cpu().numpy(), ends[:-1]), strict=True):
            self._summed.append(summed)
            if self.is_leader:
                if self._options.record is not None:
                    placement: Placement = line["placement"]
                    _record(self._options.record, summed, _write_line(line, self._recorded))
                    self._recorded = placement
                self._recent.extend(summed)
                self._last = line
        self._unsummed.clear()

    def _describe_step(self, microbatches: int, loads: StepLoads) -> dict[str, Any]:
        """Return the step's line in the record (`counterflow.balance.files.recorded`), with the placement as it is."""
        traffic = self.traffic
        return {
            "step": self._step,
            "layers": self.numbers,
            "ranks": self._placement.cluster.ranks,
            "clones_per_rank": self._options.eplb_clones_per_rank,
            "microbatches": microbatches,
            "balancedness_before": loads.before.mean(0).round(DIGITS),
            "balancedness_after": loads.after.mean(0).round(DIGITS),
            "balancedness_p5": np.percentile(loads.after, 5, 0).round(DIGITS),
            "max_over_mean": (1 / loads.after).mean(0).round(DIGITS),
            "placement": self._placement,
            "clones": traffic.clones,
            "moved": traffic.moved,
            "homes_moved": traffic.homes,
            "bytes": traffic.bytes,
            "lent": traffic.lent,
            "lent_bytes": traffic.lent_bytes,
            "home_bytes": traffic.home_bytes,
            **{f"tokens_{name.replace(' ', '_')}": int(count) for name, count in zip(TIERS, loads.tiers, strict=True)},
            "weights_ms": traffic.weights * 1e3,
            "gradients_ms": traffic.gradients * 1e3,
            "waited_ms": traffic.waited * 1e3,
            "homes_ms": traffic.moving * 1e3,
            **({"forced_ms": self.measured[0] * 1e3, "routed_ms": self.measured[1] * 1e3} if self.measured else {}),
        }

    def save_loads(self, directory: Path) -> None:
        """Save the last loads with a checkpoint, in the format of a record; print a line if that fails."""
        if self.is_leader and self._recent:
            counts = np.stack(self._recent)
            try:
                for old in directory.glob(f"*-rank{dist.get_rank():05d}.*"):
                    old.unlink()
                record_step(directory, dist.get_rank(), counts, {**_write_line(self._last, None), "microbatches": len(counts)})
            except (OSError, BalanceError) as error:
                print(
                    f"counterflow: eplb: loads are not kept, a run from {directory.parent} begins without clones: {error}",
                    flush=True,
                )

    def load_loads(self, directory: Path | None, microbatches: int) -> None:
        """Plan the first step from the loads saved with the checkpoint that the run starts from, if there are any."""
        counts = self._read_loads(directory) if self.is_leader and directory is not None and directory.is_dir() else None
        self._planner.resume(counts, microbatches, self._placement)

    def _read_loads(self, directory: Path) -> Array | None:
        try:
            record = read_record(directory)
            if record.experts == self.number_of_experts and set(self.numbers) <= set(record.layers.tolist()):
                counts: Array = record.counts[:, np.searchsorted(record.layers, self.numbers)]
                return counts
            reason = f"its layers {record.layers.tolist()} of {record.experts} experts are not this model's"
        except BalanceError as error:
            reason = str(error)
        print(f"counterflow: eplb: the loads in {directory} are not used, the first step has no clones: {reason}", flush=True)
        return None

    @property
    def are_away(self) -> bool:
        """Whether any home is elsewhere than where the trainer puts it."""
        assert self._placement.homes is not None and self._straight.homes is not None
        return bool((self._placement.homes != self._straight.homes).any())

    @contextmanager
    def be_at_home(self) -> Iterator[None]:
        """Have homes where the trainer puts them inside the block, in which it saves a checkpoint."""
        placement = self.bring_homes_back()
        yield
        if placement is not None:
            self.restore_homes(placement)

    def take_over(self) -> None:
        """Take weights that the trainer has read into the homes of a checkpoint; `bring_homes_back` was called before."""
        self._are_stale = True

    def bring_homes_back(self) -> Placement | None:
        """Move homes to where the trainer puts them, for a checkpoint; return the placement to restore, None if none moved."""
        before = self._placement
        if not self.are_away:
            return None
        self._move_homes(self._straight)
        self._place(self._straight)
        return before

    def restore_homes(self, placement: Placement) -> None:
        """Move homes back to the placement that `bring_homes_back` returned, and use it again."""
        self._move_homes(placement)
        self._place(placement)

    def _move_homes(self, new: Placement) -> tuple[int, int]:
        """Move homes, with optimizer state, to where ``new`` has them. Clones stay as they are.

        Returns how many moved, and the bytes that this rank sent.
        """
        assert self._placement.homes is not None and new.homes is not None
        if (self._placement.homes == new.homes).all():
            return 0, 0
        self.finish_gathers()
        with torch.no_grad():
            return move_homes(self._placement, new, self._group, self._take_home)

    def _follow_homes(self, planned: Placement) -> None:
        """Move homes to where a plan has them, and count them in the traffic, with the bytes that all ranks of the group sent."""
        begun = time.monotonic()
        homes, size = self._move_homes(planned)
        if homes:
            sizes = torch.tensor([size], dtype=torch.int64, device=self._device)
            dist.all_reduce(sizes, group=self._group)
            self.traffic.homes += homes
            self.traffic.home_bytes += int(sizes)
            self.traffic.moving += time.monotonic() - begun

    def _take_home(self, layer: int, place: int) -> list[torch.Tensor]:
        parameters = self._experts[layer].homes[place]
        return [tensor for p in parameters for tensor in (find_values(p).data, *self.take_state(p))]


def take_layer(placement: Placement, layer: int) -> Placement:
    """Return one layer's placement."""
    assert placement.homes is not None
    rows = slice(layer, layer + 1)
    return Placement(placement.cluster, placement.experts[rows], placement.homes[rows])


def _write_line(line: dict[str, Any], recorded: Placement | None) -> dict[str, Any]:
    """Return a line of the record behind one whose placement was ``recorded``, None for the first line."""
    rest = {name: value for name, value in line.items() if name != "placement"}
    return rest | describe_change(recorded, line["placement"])


def _record(directory: Path, counts: Array, line: dict[str, Any]) -> None:
    try:
        record_step(directory, dist.get_rank(), counts, line)
    except OSError as error:
        raise BalanceError(f"--cf-record {directory}: {error}; allowed: a folder that can be written and has room") from None


def _agree_on_cluster(ep_group: Any, width: int, stage: Any, device: torch.device) -> Cluster:
    """Return the cluster of expert-parallel ranks with ``width`` slots each; the stage's first rank decides their nodes."""
    hosts: list[Any] = [None] * ep_group.size()
    dist.all_gather_object(hosts, socket.gethostname(), group=ep_group)
    nodes = torch.from_numpy(np.unique(hosts, return_inverse=True)[1]).to(device)
    dist.broadcast(nodes, dist.get_process_group_ranks(stage)[0], group=stage)
    return Cluster((width,) * ep_group.size(), tuple(nodes.tolist()))


def number_layers(names: Sequence[str]) -> list[int]:
    """Return the layers' numbers in the model, from 1: after the first number in their modules' names, or in order."""
    found = [int(match[0]) + 1 for name in names if (match := re.search(r"\d+", name))]
    return found if len(set(found)) == len(names) else list(range(1, len(names) + 1))
