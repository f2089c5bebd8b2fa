"""Clones without state: their weights come from the homes, their gradients go home before the data-parallel reduction.

A clone has weights and a gradient buffer, and nothing else. Tensors are sent point to point, each by itself. Weights are
received in the clone's own parameters, without a copy. Gradients are received in buffers and then added at the home. They are
sent in rounds, because the home of a hot expert gets gradients from many ranks: in one round a rank receives those of at most
`RECEIVED_AT_ONCE` times as many experts as it has clones. All ranks of the group make the same calls in the same order.

A layer's gradients leave as soon as its last backward has made them, before its homes compute theirs, where the number of its
backwards is known: from that of micro-batches, and from how often the layer ran for each of them in the step before.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.cluster import Cluster
from counterflow.balance.moves import arrange_rounds
from counterflow.balance.placement import EMPTY, Placement
from counterflow.devices import find_device
from counterflow.errors import BalanceError
from counterflow.groups import open_process_group
from counterflow.moe.gradients import Defer, GradientStore, Weight, find_values

# The most tensors that an expert has. A (layer, slot) has twice as many tags: first those of weights, then those of gradients.
TENSORS_PER_EXPERT = 8
# A rank receives the gradients of so many clones at a time for each that it has itself: with one, those of an expert that has two
# clones, or of two experts of one rank, wait for each other longer than there is to compute beside them.
RECEIVED_AT_ONCE = 2
# So many layers' gradients are on their way at most.
LAYERS_AT_ONCE = 2


class Packing(Protocol):
    """How one layer's weights travel where they do not as they are. Homes and clones are numbered by their place on a rank."""

    def pack(self, home: int) -> list[torch.Tensor]:
        """Return what is sent of a home's weights."""

    def land(self, clone: int) -> list[torch.Tensor]:
        """Return the tensors that a clone receives into, in the order and the sizes of `pack`."""

    def unpack(self, clone: int) -> None:
        """Let a clone compute with what it has received."""


@dataclass
class Landing:
    """What shared slots have received packed: ``forms`` by (slot, weight), kept for the next time."""

    forms: dict[tuple[int, int], Any] = field(default_factory=dict)
    is_placed: bool = False
    """Whether something has computed with what came last."""


class SharedPacking(Protocol):
    """How one layer's weights travel to slots whose memory all layers share, where they do not rest as they are."""

    def pack(self, home: int) -> list[torch.Tensor]:
        """Return what is sent of a home's weights."""

    def prepare(self) -> frozenset[int]:
        """Get ready before anything has computed; return which weights of an expert come packed, by their index."""

    def measure(self) -> int:
        """Return the bytes of one slot's packed weights, as they rest."""

    def land(self, slots: list[list[torch.Tensor]], memory: Landing) -> list[list[torch.Tensor]]:
        """Return the tensors that each slot receives into: those of ``memory``, or the weights in ``slots`` themselves."""

    def place(self, memory: Landing) -> None:
        """Let the clones compute with what was received."""

    def lift(self) -> None:
        """Let go of that memory, which is other layers' next."""


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts on this rank: the parameters of each home slot and of each clone slot, in slot order.

    A parameter that stacks experts gives each of them a `Part`. Weights travel as they are, from parameter to parameter, unless
    there is a ``packing``.
    """

    homes: Sequence[Sequence[Weight]]
    clones: Sequence[Sequence[Weight]]
    packing: Packing | None = None
    shared: Sequence[Sequence[Weight]] = ()
    """The parameters of each slot whose memory all layers share (`counterflow.moe.just_in_time`)."""
    shared_packing: SharedPacking | None = None

    def pack(self, home: int) -> Sequence[torch.Tensor]:
        """Return what is sent of a home's weights."""
        return [find_values(one) for one in self.homes[home]] if self.packing is None else self.packing.pack(home)

    def pack_shared(self, home: int) -> Sequence[torch.Tensor]:
        """Return what is sent of a home's weights to shared slots."""
        values = self.shared_packing
        return [find_values(one) for one in self.homes[home]] if values is None else values.pack(home)

    def land(self, clone: int) -> Sequence[torch.Tensor]:
        """Return the tensors that a clone receives into."""
        return [find_values(one) for one in self.clones[clone]] if self.packing is None else self.packing.land(clone)

    def unpack(self, clone: int) -> None:
        """Let a clone compute with what it has received."""
        if self.packing is not None:
            self.packing.unpack(clone)


@dataclass
class Traffic:
    """What clones and homes of the expert-parallel group have sent since the last step.

    ``clones`` is the number of clones sent, ``moved`` how many of them went to a slot that held another expert, ``homes`` the
    number of homes that moved, ``lent`` the number of just-in-time clones, each of one micro-batch. ``bytes`` counts the weights
    and gradients of all clones, ``lent_bytes`` those of just-in-time ones alone, ``home_bytes`` weights and optimizer state of
    homes. Times are seconds of this host's clock:
    ``weights`` and ``gradients`` run from the start of a transfer to its end, ``waited`` is the part in which the host waited.
    ``moving`` is the time in which homes moved, and nothing else happened.
    """

    clones: int = 0
    moved: int = 0
    homes: int = 0
    lent: int = 0
    bytes: int = 0
    lent_bytes: int = 0
    home_bytes: int = 0
    weights: float = 0.0
    gradients: float = 0.0
    waited: float = 0.0
    moving: float = 0.0

    def reset(self) -> None:
        """Set all numbers to zero."""
        for name, value in vars(Traffic()).items():
            setattr(self, name, value)


@dataclass(frozen=True)
class _Transfer:
    """The clone in ``slot`` of ``layer``, and the home of its expert.

    ``clone`` is the clone's index among the clones of its rank, ``home`` the home's index among the homes of its rank.
    """

    layer: int
    slot: int
    clone_rank: int
    clone: int
    home_rank: int
    home: int


@dataclass
class _Return:
    """Gradients on their way home: rounds that are still to be sent, and what is under way."""

    rounds: list[list[_Transfer]]
    works: list[dist.Work] = field(default_factory=list)
    landing: list[tuple[_Transfer, list[torch.Tensor]]] = field(default_factory=list)


class Clones:
    """The clones of one model chunk's layers: sends weights from homes to clones, and gradients from clones to homes.

    ``group`` serves these transfers alone. ``first_layer`` is the index of the chunk's first layer in the placement that
    `refresh` takes. ``gradients`` is the trainer's gradient store. ``defer`` runs what it is given at the W that is due for it,
    or at once.
    """

    def __init__(
        self,
        layers: list[LayerExperts],
        first_layer: int,
        cluster: Cluster,
        group: dist.ProcessGroup,
        traffic: Traffic,
        gradients: GradientStore,
        defer: Defer | None = None,
    ) -> None:
        self._layers, self._first = layers, first_layer
        self._group, self._traffic, self._gradients, self._defer = group, traffic, gradients, defer
        self._rank, self._ranks = group.rank(), cluster.ranks
        self._peers = dist.get_process_group_ranks(group)
        self._width, self._own = cluster.slots_per_rank[0], len(layers[0].homes)
        self._limit = find_limit(group, layers[0])
        self._held: list[_Transfer] = []
        self._cloned: set[int] = set()
        # By layer: when its transfers began, the transfers, the clones of this rank that receive.
        self._coming: dict[int, tuple[float, list[dist.Work], list[int]]] = {}
        # Of this step: layers whose gradients have not left yet, and what is on its way.
        self._unsent: set[int] = set()
        self._returns: list[_Return] = []
        # By layer: backwards in this step, and how many there will be, 0 where that is not known.
        self._counted, self._expected = [0] * len(layers), [0] * len(layers)
        self._microbatches: int | None = None
        self._sent_home_at: float | None = None
        self.finish_lent: Callable[[], None] | None = None
        """Brings home what just-in-time clones have still to return; with them gradients are home at the end of a step alone."""
        self.are_home = True
        """Whether this step's gradients have been added at the homes."""
        for layer in layers:
            for clone in layer.clones:
                _prepare(clone, layer.homes[0], gradients)

    def refresh(self, placement: Placement, wanted: Array) -> None:
        """Start sending weights to the clones of ``placement`` that are ``wanted``, ``bool[layers, slots]``.

        The homes' weights must not change before `finish_refresh`.
        """
        self.finish_transfers()
        self._held = self._list_transfers(placement)
        self._cloned = {t.layer for t in self._held}
        for layer in range(len(self._layers)):
            sent = [t for t in self._held if t.layer == layer and wanted[self._first + layer, t.slot]]
            if operations := self._list_operations(layer, sent):
                receiving = [t.clone for t in sent if t.clone_rank == self._rank]
                self._coming[layer] = time.monotonic(), dist.batch_isend_irecv(operations), receiving

    def _list_operations(self, layer: int, sent: list[_Transfer]) -> list[dist.P2POp]:
        experts = self._layers[layer]
        # A home with several clones packs once.
        packed = {home: experts.pack(home) for home in sorted({t.home for t in sent if t.home_rank == self._rank})}
        landing = {t.clone: experts.land(t.clone) for t in sent if t.clone_rank == self._rank}
        if sent:
            one = next(iter([*packed.values(), *landing.values()]), None)
            self._traffic.bytes += len(sent) * count_bytes(experts.pack(0) if one is None else one)
        return [
            *(o for t in sent for o in self._send(packed.get(t.home, ()), t.home_rank, t.clone_rank, t, 0)),
            *(o for t in sent for o in self._receive(landing.get(t.clone, ()), t.home_rank, t.clone_rank, t, 0)),
        ]

    def finish_refresh(self, layer: int) -> bool:
        """Wait for one layer's weights before its clones compute; tell whether any were sent in this step."""
        if layer not in self._coming:
            return False
        self._wait_for_weights(layer)
        del self._coming[layer]
        return True

    def finish_transfers(self) -> None:
        """Wait for all weights that are still in transfer; `finish_refresh` still returns True for their layers."""
        for layer in self._coming:
            self._wait_for_weights(layer)

    def expect_gradients(self, microbatches: int | None = None) -> None:
        """Begin a step of so many micro-batches, where that is known, after `refresh`.

        It sets the clones' gradients to zero; they have to be sent home in this step.
        """
        for parameter in list_clone_parameters(self._layers):
            self._gradients.clear(parameter)
        before, now = self._microbatches, microbatches or 0
        self._expected = [count // before * now if before and not count % before else 0 for count in self._counted]
        self._counted, self._microbatches = [0] * len(self._layers), microbatches
        self._unsent, self._returns = set(self._cloned), []
        self._sent_home_at, self.are_home = None, not self._held and self.finish_lent is None

    def has_any(self, layer: int) -> bool:
        """Tell whether a layer has clones in this step, on any rank."""
        return layer in self._cloned

    def note_backward(self, layer: int) -> None:
        """Take note of a layer's backward, in which the gradients of its clones come; behind the last one they leave.

        Raises `BalanceError` where one comes after the last.
        """
        if self._defer is not None:
            self._defer(partial(self._count_backward, layer))

    def note_end(self) -> None:
        """Take note of the end of a layer's backward, beside whose rest the next gradients may be on their way."""
        if self._defer is not None:
            self._defer(self._advance_returns)

    def _count_backward(self, layer: int) -> None:
        self._counted[layer] += 1
        if not self._expected[layer] or self._counted[layer] < self._expected[layer]:
            return
        if self._counted[layer] > self._expected[layer]:
            raise BalanceError(
                f"a MoE layer runs more often for {self._microbatches} micro-batches than the {self._expected[layer]} times that "
                "follow from the step before, and the gradients of its clones have left: every micro-batch has to run it alike"
            )
        if layer in self._unsent:
            self._advance_returns()
            while len(self._returns) >= LAYERS_AT_ONCE:
                self._finish_return(self._returns.pop(0))
            self._unsent.remove(layer)
            self._start_return([one for one in self._held if one.layer == layer])

    def start_homecoming(self) -> None:
        """Start sending the gradients home that have not left, once they are complete."""
        if not self.are_home and self._unsent:
            left, self._unsent = self._unsent, set()
            self._start_return([one for one in self._held if one.layer in left])

    def _start_return(self, held: list[_Transfer]) -> None:
        senders = np.array([t.clone_rank for t in held], np.int64)
        receivers = np.array([t.home_rank for t in held], np.int64)
        turns = arrange_rounds(senders, receivers, self._ranks, RECEIVED_AT_ONCE * max(1, self._width - self._own)).tolist()
        rounds: list[list[_Transfer]] = [[] for _ in range(max(turns) + 1)]
        for transfer, turn in zip(held, turns, strict=True):
            rounds[turn].append(transfer)
            self._traffic.bytes += count_bytes(list_gradients(self._layers[transfer.layer].clones[0], self._gradients))
        if self._sent_home_at is None:
            self._sent_home_at = time.monotonic()
        self._returns.append(_Return(rounds))
        self._start_round(self._returns[-1])

    def finish_homecoming(self) -> None:
        """Wait until this step's gradients have been added at the homes."""
        self.start_homecoming()
        if self.finish_lent is not None:
            self.finish_lent()
        if self.are_home or self._sent_home_at is None:
            self.are_home = True
            return
        while self._returns:
            self._finish_return(self._returns.pop(0))
        self._traffic.gradients += time.monotonic() - self._sent_home_at
        self.are_home = True

    def finish_step(self) -> None:
        """Wait for all transfers, since the optimizer changes the tensors next."""
        self.finish_transfers()
        self.finish_homecoming()

    def _advance_returns(self) -> None:
        for going in self._returns:
            self._advance(going)

    def _advance(self, going: _Return) -> None:
        """Start the next round if there is one."""
        if going.rounds:
            self._finish_round(going)
            self._start_round(going)

    def _finish_return(self, going: _Return) -> None:
        while going.rounds:
            self._advance(going)
        self._finish_round(going)

    def _finish_round(self, going: _Return) -> None:
        """Wait for a round, and add what has come at the homes."""
        self._wait(going.works)
        with torch.no_grad():
            for transfer, gradients in going.landing:
                trained = [p for p in self._layers[transfer.layer].homes[transfer.home] if self._gradients.of(p) is not None]
                for home, gradient in zip(trained, gradients, strict=True):
                    self._gradients.add(home, gradient)

    def _start_round(self, going: _Return) -> None:
        operations: list[dist.P2POp] = []
        going.landing = []
        for transfer in going.rounds.pop(0):
            layer = self._layers[transfer.layer]
            ends = transfer.clone_rank, transfer.home_rank, transfer, TENSORS_PER_EXPERT
            if transfer.clone_rank == self._rank:
                operations += self._send(list_gradients(layer.clones[transfer.clone], self._gradients), *ends)
            if transfer.home_rank == self._rank:
                homes = list_gradients(layer.homes[transfer.home], self._gradients)
                landing = [torch.empty_like(gradient) for gradient in homes]
                going.landing.append((transfer, landing))
                operations += self._receive(landing, *ends)
        going.works = dist.batch_isend_irecv(operations) if operations else []

    def _list_transfers(self, placement: Placement) -> list[_Transfer]:
        """Return every clone that ``placement`` has in this chunk's layers, ordered by layer and slot."""
        assert placement.homes is not None
        rows = slice(self._first, self._first + len(self._layers))
        experts, homes = placement.experts[rows], placement.homes[rows]
        is_clone = experts != EMPTY
        np.put_along_axis(is_clone, homes, False, 1)
        layers, slots = np.nonzero(is_clone)
        clone_ranks, places = np.divmod(slots, self._width)
        home_ranks, home_places = np.divmod(homes[layers, experts[layers, slots]], self._width)
        columns = layers, slots, clone_ranks, places - self._own, home_ranks, home_places
        return [_Transfer(*row) for row in np.stack(columns, 1).tolist()]

    def _send(self, tensors: Iterable[torch.Tensor], giver: int, taker: int, transfer: _Transfer, tag: int) -> list[dist.P2POp]:
        if giver != self._rank:
            return []
        return self._make_operations(dist.isend, tensors, taker, transfer, tag)

    def _receive(
        self, tensors: Iterable[torch.Tensor], giver: int, taker: int, transfer: _Transfer, tag: int
    ) -> list[dist.P2POp]:
        return self._make_operations(dist.irecv, tensors, giver, transfer, tag) if taker == self._rank else []

    def _make_operations(
        self, run: Callable[..., Any], tensors: Iterable[torch.Tensor], peer: int, transfer: _Transfer, tag: int
    ) -> list[dist.P2POp]:
        """Return one operation for each tensor. Each has a tag of its own, for process groups that match messages by tags."""
        place = (self._first + transfer.layer) * self._ranks * self._width + transfer.slot
        begin = 2 * TENSORS_PER_EXPERT * place + tag
        return [
            dist.P2POp(run, tensor.detach(), self._peers[peer], self._group, begin + part) for part, tensor in enumerate(tensors)
        ]

    def _wait_for_weights(self, layer: int) -> None:
        begun, works, receiving = self._coming[layer]
        if works:
            self._wait(works)
            self._traffic.weights += time.monotonic() - begun
            for clone in receiving:
                self._layers[layer].unpack(clone)
            self._coming[layer] = begun, [], []

    def _wait(self, works: list[dist.Work]) -> None:
        begun = time.monotonic()
        for work in works:
            work.wait(*self._limit)
        self._traffic.waited += time.monotonic() - begun


def find_timeout(group: dist.ProcessGroup) -> timedelta:
    """Return how long the ranks of a group wait for each other."""
    timeout: timedelta = group._get_backend(find_device()).options._timeout
    return timeout


def find_limit(group: dist.ProcessGroup, layer: LayerExperts) -> tuple[timedelta, ...]:
    """Return the arguments with which a transfer is waited for."""
    # Waiting on a GPU orders streams and returns; a time limit there would stop the host instead.
    return (find_timeout(group),) if find_values(layer.homes[0][0]).device.type == "cpu" else ()


def open_group(experts: dist.ProcessGroup, name: str = "CF_CLONES") -> dist.ProcessGroup:
    """Open a process group for clones, with the ranks and the timeout of ``experts``, the trainer's expert-parallel group."""
    group = open_process_group(dist.get_process_group_ranks(experts), find_timeout(experts), name)
    # The first batch of transfers in a group may need all of its ranks, but not all of them take part in it.
    dist.barrier(group=group)
    return group


def measure_clones(layers: list[LayerExperts], gradients: GradientStore) -> tuple[int, int]:
    """Return the bytes of the weights and of the gradients of this rank's clones."""
    parameters = list_clone_parameters(layers)
    return count_bytes(map(find_values, parameters)), count_bytes(list_gradients(parameters, gradients))


def list_clone_parameters(layers: list[LayerExperts]) -> list[Weight]:
    """Return the parameters of all clones on this rank."""
    return [parameter for layer in layers for clone in layer.clones for parameter in clone]


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def list_gradients(parameters: Sequence[Weight], gradients: GradientStore) -> list[torch.Tensor]:
    """Return the gradients of the parameters that are not frozen."""
    return [gradient for parameter in parameters if (gradient := gradients.of(parameter)) is not None]


def _prepare(clone: Sequence[Weight], home: Sequence[Weight], gradients: GradientStore) -> None:
    """Give a clone's parameters the shape and type of a home's, and let them collect gradients as the home's do."""
    match_home(clone, home)
    for copied, own in zip(clone, home, strict=True):
        gradients.prepare(copied, own)


def match_home(clone: Sequence[Weight], home: Sequence[Weight]) -> None:
    """Give a clone's parameters the shape and type of a home's, with zeros.

    Raises `BalanceError` if the clone cannot hold the home.
    """
    if len(clone) != len(home) or len(home) > TENSORS_PER_EXPERT:
        raise BalanceError(
            f"a clone slot of {len(clone)} tensors for an expert of {len(home)}; allowed: up to {TENSORS_PER_EXPERT}, as many in "
            "both; build clone slots like the experts"
        )
    for copied, own in zip(clone, home, strict=True):
        if isinstance(copied, torch.nn.Parameter) and isinstance(own, torch.nn.Parameter):
            copied.data = torch.zeros_like(own.data)
            copied.requires_grad_(own.requires_grad)
            continue
        # Parts are parts of a parameter that the adapter has made.
        slot, expert = find_values(copied), find_values(own)
        if slot.shape != expert.shape or slot.dtype != expert.dtype:
            raise BalanceError(
                f"a clone slot of {slot.dtype} and shape {tuple(slot.shape)} for an expert's weight of {expert.dtype} and shape "
                f"{tuple(expert.shape)}; allowed: the same in both; build clone slots like the experts"
            )
