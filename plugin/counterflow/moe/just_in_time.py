"""Just-in-time clones: for one layer and micro-batch, in slots that all MoE layers of a rank share.

A `Loan` is what a micro-batch clones in one layer. Its weights are sent as soon as it is planned, while tokens are dispatched,
and arrive in the rank's shared set of clone slots before the experts compute. The next layer's loan overwrites them. So they are
sent again for the backward: it starts at the gradient of the layer's output, and is waited for before the experts' backward.
Nothing is sent again where the set still holds the loan, as after a recomputed forward. With ``keeps`` nothing is sent again at
all: what a forward computes with has memory of its own, which lives until its backward.

There is one set, and a second where two actions may compute in turn (``pairs``): backwards and what they recompute use that one.
A parameter of a layer's clones has a set's memory while it computes: `receive` puts it there. What autograd has kept of the
forward is the parameter, not the memory, so the backward computes with what came for it; views of it are led there by
`keep_places`. The same goes for quantized weights, whose memory a `SharedPacking` knows.

Gradients are made and sent home with the micro-batch's weight gradients: at once in a B, at the W of an I (``defer``). Their
memory is shared by every second layer. So at most two loans' gradients are on their way, however many W are due. They are added
at the homes in a fixed order, at points of the program that the clock does not change.

All ranks of the group come to all points in the same order, with the same loans.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.moves import arrange_rounds
from counterflow.balance.placement import EMPTY, Placement
from counterflow.moe.clones import (
    RECEIVED_AT_ONCE,
    TENSORS_PER_EXPERT,
    Landing,
    LayerExperts,
    Traffic,
    count_bytes,
    find_limit,
    list_gradients,
    match_home,
)
from counterflow.moe.gradients import Defer, GradientStore, Part, Weight
from counterflow.moe.notices import notice

# Sets of gradients: one is filled while the other is on its way.
GRADIENT_SETS = 2
# What travels; each has tags of its own.
FORWARD, BACKWARD, GRADIENT = range(3)


@dataclass(frozen=True)
class Lent:
    """One clone: its ``slot`` in the layer, its rank and place among that rank's shared slots, its home's rank and place."""

    slot: int
    clone_rank: int
    clone: int
    home_rank: int
    home: int


@dataclass(frozen=True)
class Loan:
    """What one micro-batch clones in a layer, ordered by slot. ``layer`` is the layer's index among those of this rank.

    Homes do not change within a step, so equal loans of a step have equal weights.
    """

    layer: int
    lent: tuple[Lent, ...]


def list_lent(placement: Placement, is_used: Array, first: int) -> tuple[Lent, ...]:
    """Return the clones of a placement of one layer that are in slots from place ``first`` of a rank on and are used.

    ``is_used``, ``bool[slots]``, tells which slots have tokens.
    """
    assert placement.homes is not None
    (experts,), (homes,) = placement.experts, placement.homes
    width = placement.cluster.slots_per_rank[0]
    ranks, places = np.divmod(np.arange(len(experts)), width)
    slots = np.flatnonzero((experts != EMPTY) & is_used & (places >= first))
    home_ranks, home_places = np.divmod(homes[experts[slots]], width)
    rows = np.stack((slots, ranks[slots], places[slots] - first, home_ranks, home_places), 1)
    return tuple(Lent(*row) for row in rows.tolist())


@dataclass
class _Return:
    """Gradients on their way home: what is still to be sent, in rounds, and what arrives. ``own`` are this rank's, by clone."""

    loan: Loan
    rounds: list[list[Lent]]
    own: dict[int, list[torch.Tensor]]
    begun: float
    works: list[dist.Work]
    landing: list[tuple[Lent, list[torch.Tensor]]]


@dataclass
class _Set:
    """Memory of one set of slots by the form of a layer's experts: whole weights, and what they come as where they are packed."""

    values: dict[Any, list[torch.Tensor]] = field(default_factory=dict)
    landings: dict[Any, Landing] = field(default_factory=dict)


class JustInTime:
    """The shared clone slots of one rank, and their traffic; ``layers`` are all MoE layers of the rank.

    ``group`` serves these transfers alone. ``defer`` runs what it is given at the W that is due for it, or at once. With
    ``pairs`` a forward and a backward may compute in turn; with ``keeps`` a forward's weights stay until its backward.
    """

    def __init__(
        self,
        layers: Sequence[LayerExperts],
        group: dist.ProcessGroup,
        traffic: Traffic,
        gradients: GradientStore,
        defer: Defer,
        *,
        pairs: bool,
        keeps: bool = False,
    ) -> None:
        self._keeps = keeps
        self._layers, self._group, self._traffic, self._gradients, self._defer = layers, group, traffic, gradients, defer
        self._rank, self._ranks = group.rank(), group.size()
        self._peers = dist.get_process_group_ranks(group)
        self._limit = find_limit(group, layers[0])
        self._shared = [_SharedLayer(layer) for layer in layers]
        self._backward = int(pairs)
        self._sets = _share_memory(self._shared, layers, gradients, defer, 1 + self._backward)
        # By set: the memory of what it holds, its own or what a forward keeps.
        self._held = list(self._sets)
        # By set: the loan that it holds or that is under way to it, with whether a forward keeps it, the same on all ranks; and
        # its transfers: what comes, and what is sent.
        self._holds: list[tuple[Loan, bool] | None] = [None] * len(self._sets)
        self._coming: list[list[dist.Work]] = [[] for _ in self._sets]
        self._sent: list[list[dist.Work]] = [[] for _ in self._sets]
        self._returns: list[_Return] = []
        # Makes what computes with clones require gradients, whatever its other inputs do.
        self._anchor = torch.zeros((), requires_grad=True)

    def lend(self, layer: int, placement: Placement, is_used: Array, first: int) -> Loan | None:
        """Start sending the weights of what ``placement`` clones in shared slots; return the loan, None if there is none."""
        lent = list_lent(placement, is_used, first)
        self._advance_returns()
        if not lent:
            return None
        loan = Loan(layer, lent)
        # What a backward recomputes has been counted.
        self._traffic.lent += 0 if is_in_backward() else len(lent)
        self._send(loan)
        return loan

    def recall(self, loan: Loan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a layer's output; at its gradient the loan's weights are sent again, and its gradients begin at zero."""
        return notice(partial(self._begin_backward, loan), *tensors)

    def give_back(self, loan: Loan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the input of the clones, on a rank without any of the loan the output of the experts; both once a micro-batch.

        At its gradient the loan's gradients are sent home: beside the backward of the homes, which comes behind that of clones.
        """
        return notice(partial(self._end_backward, loan), *tensors)

    def compute(
        self,
        loan: Loan,
        run: Callable[..., torch.Tensor],
        *inputs: torch.Tensor,
        leave: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Return the output of ``run(*inputs)``, the clones' forward, whose backward computes with weights that come anew.

        After the backward ``leave`` hands over the weight gradients that modules keep of their own accord.
        """
        if not torch.is_grad_enabled():
            self.receive(loan)
            output = run(*inputs)
            self.let_go(loan)
            return output
        return _Compute.apply(self, loan, run, leave, self._anchor, *inputs)  # type: ignore[no-any-return]

    def finish_homecoming(self) -> None:
        """Wait until all gradients have been added at the homes."""
        while self._returns:
            self._finish_return(self._returns.pop(0))

    def finish_step(self) -> None:
        """Wait for all transfers, since the homes' weights may change next. No set holds anything then."""
        self.finish_homecoming()
        for works in (*self._coming, *self._sent):
            self._wait(works)
        self._holds = [None] * len(self._sets)
        self._held = list(self._sets)

    def measure_kept(self) -> int:
        """Return the bytes of weights that one micro-batch may keep on this rank, in all layers, from forward to backward."""
        if not self._keeps:
            return 0
        return sum(_count_read(one.wholes) for one in self._shared) + sum(self._measure_packed())

    def measure_packed(self) -> tuple[int, int]:
        """Return the bytes of packed weights in the shared sets, and in such slots of each layer of this rank."""
        sizes = self._measure_packed()
        # Layers of one form have one memory, which those take that compute with packed weights.
        by_form = dict(sorted(((one.form, size) for one, size in zip(self._shared, sizes, strict=True)), key=itemgetter(1)))
        return len(self._sets) * sum(by_form.values()), sum(sizes)

    def _measure_packed(self) -> list[int]:
        packings = [(layer.shared_packing, len(layer.shared)) for layer in self._layers]
        return [0 if packing is None else count * packing.measure() for packing, count in packings]

    def measure_memory(self) -> tuple[int, int]:
        """Return the bytes of the shared sets' weights, packed ones too, and of their gradients."""
        weights = sum(_count_read(one) for own in self._sets for one in own.values.values())
        kept = {g.data_ptr(): g for one in self._shared for g in list_gradients(one.wholes, self._gradients)}
        return weights + self.measure_packed()[0], count_bytes(kept.values())

    def measure_layers(self) -> tuple[int, int]:
        """Return the bytes that weights and gradients would take in such slots of each layer of this rank."""
        weights = sum(_count_read(one.wholes) for one in self._shared) + self.measure_packed()[1]
        return weights, sum(count_bytes(list_gradients(one.wholes, self._gradients)) for one in self._shared)

    def _send(self, loan: Loan) -> None:
        """Have a loan's weights come into the set of what runs now, a forward or a backward, unless it holds them."""
        which = self._find_set()
        keeps = self._keeps and torch.is_grad_enabled()
        held, is_kept = self._holds[which] or (None, False)
        # What a forward without gradients has left in the set's own memory is overwritten by the next of them.
        if held == loan and (is_kept or not keeps):
            return
        # What a rank received and had no use for; what it sent has gone out, or its receiver would not be here.
        self._wait(self._coming[which])
        self._wait(self._sent[which])
        self._holds[which] = loan, keeps
        self._start_sending(loan, which, keeps=keeps)

    def _start_sending(self, loan: Loan, which: int, *, keeps: bool) -> None:
        """Start sending a loan's weights into a set; with ``keeps`` into memory that a forward keeps."""
        layer = self._layers[loan.layer]
        kind = BACKWARD if which else FORWARD
        is_taker = any(one.clone_rank == self._rank for one in loan.lent)
        landing = self._make_landing(which, loan, keeps=keeps) if is_taker else []
        # A home with several clones packs once.
        packed = {home: layer.pack_shared(home) for home in sorted({t.home for t in loan.lent if t.home_rank == self._rank})}
        receives: list[dist.P2POp] = []
        sends: list[dist.P2POp] = []
        for one in loan.lent:
            if one.clone_rank == self._rank:
                receives += self._make_operations(dist.irecv, landing[one.clone], one.home_rank, loan, one, kind)
            if one.home_rank == self._rank:
                sends += self._make_operations(dist.isend, packed[one.home], one.clone_rank, loan, one, kind)
        some = [*packed.values(), *landing]
        self._count(len(loan.lent) * count_bytes(some[0] if some else layer.pack_shared(0)))
        works = dist.batch_isend_irecv([*receives, *sends]) if receives or sends else []
        # NCCL has one work for all, which both then wait for.
        is_each = len(works) == len(receives) + len(sends)
        self._coming[which] = works[: len(receives)] if is_each else list(works)
        self._sent[which] = works[len(receives) :] if is_each else []

    def _make_landing(self, which: int, loan: Loan, *, keeps: bool) -> list[list[torch.Tensor]]:
        """Return for each shared slot the tensors that it receives into; a forward that keeps them has new ones."""
        layer, shared, own = self._layers[loan.layer], self._shared[loan.layer], self._sets[which]
        packing = layer.shared_packing
        if keeps:
            own = _Set({shared.form: shared.make_memory()})
        self._held[which] = own
        slots = [shared.find_tensors(own.values[shared.form], clone) for clone in range(len(layer.shared))]
        return slots if packing is None else packing.land(slots, own.landings.setdefault(shared.form, Landing()))

    def receive(self, loan: Loan, kept: Any = None) -> None:
        """Wait for a loan's weights, and let the layer's clones compute with them, or at once with what a forward ``kept``."""
        which = self._find_set()
        if kept is None:
            held, _ = self._holds[which] or (None, False)
            assert held == loan, "another loan has taken the shared slots"
            self._wait(self._coming[which])
            kept = self._held[which]
        shared, packing = self._shared[loan.layer], self._layers[loan.layer].shared_packing
        for whole, values in zip(shared.wholes, kept.values[shared.form], strict=True):
            whole.data = values
        if packing is not None:
            packing.place(kept.landings[shared.form])

    def let_go(self, loan: Loan) -> None:
        """Leave a layer's clones without memory of their own, behind their forward or backward."""
        shared, packing = self._shared[loan.layer], self._layers[loan.layer].shared_packing
        if self._keeps:
            for whole, values in zip(shared.wholes, self._sets[0].values[shared.form], strict=True):
                whole.data = values
        if packing is not None:
            packing.lift()

    def get_kept(self) -> Any:
        """Return the memory with which a forward computes if its backward finds it there, else None."""
        return self._held[self._find_set()] if self._keeps else None

    def keep_places(self, loan: Loan) -> AbstractContextManager[Any]:
        """Return a context manager: a backward reads what is kept inside of shared weights where they come for it.

        That is for views of parameters: what autograd keeps of them is the forward's memory, whatever the parameter's is then.
        A store that finds gradients at parameters is of modules that keep parameters, and needs them as they are.

        What is kept inside stays kept: a checkpoint that recomputes where autograd unpacks would run the layer once more for the
        graph of the clones, and with it the layer's collectives, on the ranks that have clones alone.
        """
        shared = self._shared[loan.layer]
        if self._gradients.is_on_parameters:
            return nullcontext()
        here, there = (self._sets[which].values[shared.form] for which in (self._find_set(), self._backward))
        is_moved = self._backward and not self._keeps
        places = {one.untyped_storage().data_ptr(): place for place, one in enumerate(here)} if is_moved else {}

        def pack(tensor: torch.Tensor) -> Any:
            place = places.get(tensor.untyped_storage().data_ptr())
            return tensor if place is None else (place, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(kept: Any) -> torch.Tensor:
            return kept if torch.is_tensor(kept) else there[kept[0]].as_strided(*kept[1:])

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _find_set(self) -> int:
        return self._backward if is_in_backward() else 0

    def _begin_backward(self, loan: Loan) -> None:
        self._advance_returns()
        if not self._keeps:
            self._send(loan)
        self._defer(partial(self._begin_gradients, loan))

    def _end_backward(self, loan: Loan) -> None:
        self._defer(partial(self._return_gradients, loan))

    def _begin_gradients(self, loan: Loan) -> None:
        """Have the gradients of a loan's layer begin at zero, once those that had their memory before are home."""
        taken = [one.loan.layer % GRADIENT_SETS == loan.layer % GRADIENT_SETS for one in self._returns]
        for _ in range(max((place + 1 for place, is_taken in enumerate(taken) if is_taken), default=0)):
            self._finish_return(self._returns.pop(0))
        for one in self._shared[loan.layer].wholes:
            self._gradients.clear(one)

    def _return_gradients(self, loan: Loan) -> None:
        """Start sending a loan's gradients home; a rank receives at most `RECEIVED_AT_ONCE` at a time for each shared slot."""
        senders = np.array([t.clone_rank for t in loan.lent], np.int64)
        receivers = np.array([t.home_rank for t in loan.lent], np.int64)
        layer = self._layers[loan.layer]
        turns = arrange_rounds(senders, receivers, self._ranks, RECEIVED_AT_ONCE * len(layer.shared)).tolist()
        rounds: list[list[Lent]] = [[] for _ in range(max(turns) + 1)]
        for one, turn in zip(loan.lent, turns, strict=True):
            rounds[turn].append(one)
        self._count(len(loan.lent) * count_bytes(list_gradients(layer.homes[0], self._gradients)))
        mine = [one.clone for one in loan.lent if one.clone_rank == self._rank]
        own = {clone: list_gradients(layer.shared[clone], self._gradients) for clone in mine}
        for whole in self._shared[loan.layer].wholes:
            self._gradients.release(whole)
        self._returns.append(_Return(loan, rounds, own, time.monotonic(), [], []))
        self._start_round(self._returns[-1])

    def _start_round(self, going: _Return) -> None:
        layer, loan = self._layers[going.loan.layer], going.loan
        operations: list[dist.P2POp] = []
        going.landing = []
        for one in going.rounds.pop(0):
            if one.clone_rank == self._rank:
                operations += self._make_operations(dist.isend, going.own[one.clone], one.home_rank, loan, one, GRADIENT)
            if one.home_rank == self._rank:
                landing = [torch.empty_like(gradient) for gradient in list_gradients(layer.homes[one.home], self._gradients)]
                going.landing.append((one, landing))
                operations += self._make_operations(dist.irecv, landing, one.clone_rank, loan, one, GRADIENT)
        going.works = dist.batch_isend_irecv(operations) if operations else []

    def _advance_returns(self) -> None:
        """Start the next round of returns that have more than one, so that a layer passes beside each of them."""
        for going in self._returns:
            if going.rounds:
                self._finish_round(going)
                self._start_round(going)

    def _finish_round(self, going: _Return) -> None:
        """Wait for a round, and add what has come at the homes."""
        layer = self._layers[going.loan.layer]
        self._wait(going.works)
        # From here on the gradients that were sent may be overwritten.
        with torch.no_grad():
            for one, gradients in going.landing:
                trained = [p for p in layer.homes[one.home] if self._gradients.of(p) is not None]
                for home, gradient in zip(trained, gradients, strict=True):
                    self._gradients.add(home, gradient)

    def _finish_return(self, going: _Return) -> None:
        self._finish_round(going)
        while going.rounds:
            self._start_round(going)
            self._finish_round(going)
        self._traffic.gradients += time.monotonic() - going.begun

    def _make_operations(
        self, run: Callable[..., Any], tensors: Sequence[torch.Tensor], peer: int, loan: Loan, one: Lent, kind: int
    ) -> list[dist.P2POp]:
        """Return one operation for each tensor, with a tag of its own."""
        first = 3 * TENSORS_PER_EXPERT * (loan.layer * self._ranks * len(self._layers[0].shared) + self._number(one))
        first += kind * TENSORS_PER_EXPERT
        return [
            dist.P2POp(run, tensor.detach(), self._peers[peer], self._group, first + part) for part, tensor in enumerate(tensors)
        ]

    def _number(self, one: Lent) -> int:
        return one.clone_rank * len(self._layers[0].shared) + one.clone

    def _count(self, size: int) -> None:
        self._traffic.bytes += size
        self._traffic.lent_bytes += size

    def _wait(self, works: list[dist.Work]) -> None:
        begun = time.monotonic()
        for work in works:
            work.wait(*self._limit)
        works.clear()
        self._traffic.waited += time.monotonic() - begun


def is_in_backward() -> bool:
    """Tell whether autograd runs a backward on this thread; a forward that it recomputes belongs to it."""
    return bool(torch._C._current_graph_task_id() != -1)


def _count_read(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes of tensors without those that have no memory (`_SharedLayer.make_memory`)."""
    return count_bytes(one for one in tensors if not _is_unread(one))


def _is_unread(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 0 and not any(tensor.stride())


class _SharedLayer:
    """The parameters of one layer's shared slots, and where in them each clone is."""

    def __init__(self, layer: LayerExperts) -> None:
        packed = layer.shared_packing.prepare() if layer.shared_packing is not None else frozenset[int]()
        self.wholes: list[torch.nn.Parameter] = []
        self._places: list[list[tuple[int, int | None]]] = []
        number: dict[int, int] = {}
        for clone in layer.shared:
            for weight in clone:
                whole = weight.whole if isinstance(weight, Part) else weight
                if id(whole) not in number:
                    number[id(whole)] = len(self.wholes)
                    self.wholes.append(whole)
            self._places.append([self._find_place(weight, number) for weight in clone])
        self._unread = frozenset(clone[part][0] for clone in self._places for part in packed)

    def _find_place(self, weight: Weight, number: dict[int, int]) -> tuple[int, int | None]:
        return (number[id(weight.whole)], weight.index) if isinstance(weight, Part) else (number[id(weight)], None)

    @property
    def form(self) -> tuple[Any, ...]:
        """Layers of one form can share memory."""
        return self._unread, *((tuple(one.shape), one.dtype, one.requires_grad) for one in self.wholes)

    def make_memory(self) -> list[torch.Tensor]:
        """Return memory for the parameters: none for weights that come packed, of which all that is read is NaN."""
        return [
            whole.data.new_full((), math.nan).expand(whole.shape) if place in self._unread else torch.zeros_like(whole.data)
            for place, whole in enumerate(self.wholes)
        ]

    def find_tensors(self, memory: Sequence[torch.Tensor], clone: int) -> list[torch.Tensor]:
        """Return where a clone's weights are in the memory of a set."""
        return [memory[whole] if part is None else memory[whole][part] for whole, part in self._places[clone]]


def _share_memory(
    shared: Sequence[_SharedLayer], layers: Sequence[LayerExperts], gradients: GradientStore, defer: Defer, sets: int
) -> list[_Set]:
    """Let layers whose experts have one form share weights, and every second one of them gradients; return the sets' weights."""
    memory = [_Set() for _ in range(sets)]
    firsts: dict[Any, LayerExperts] = {}
    for index, (one, layer) in enumerate(zip(shared, layers, strict=True)):
        for clone in layer.shared:
            match_home(clone, layer.homes[0])
        for own in memory:
            if one.form not in own.values:
                own.values[one.form] = one.make_memory()
        for whole, values in zip(one.wholes, memory[0].values[one.form], strict=True):
            whole.data = values
        first = firsts.setdefault((one.form, index % GRADIENT_SETS), layer)
        for clone, others in zip(layer.shared, first.shared, strict=True):
            for weight, like, other in zip(clone, layer.homes[0], others, strict=True):
                gradients.share(weight, like, None if first is layer else other, defer)
    return memory


class _Compute(torch.autograd.Function):
    """The clones' forward in a graph of its own, which the backward runs when the weights have come again."""

    @staticmethod
    def forward(
        ctx: Any,
        slots: JustInTime,
        loan: Loan,
        run: Callable[..., torch.Tensor],
        leave: Callable[[], None],
        anchor: torch.Tensor,
        *given: torch.Tensor,
    ) -> torch.Tensor:
        """Return the output of the clones."""
        ctx.set_materialize_grads(False)
        slots.receive(loan)
        needed = zip(given, ctx.needs_input_grad[5:], strict=True)
        inputs = [one.detach().requires_grad_(is_needed) for one, is_needed in needed]
        with torch.enable_grad(), slots.keep_places(loan):
            output = run(*inputs)
        ctx.slots, ctx.loan, ctx.leave, ctx.kept = slots, loan, leave, (inputs, output, slots.get_kept())
        slots.let_go(loan)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Return the gradients of the inputs; those of weights go to their store."""
        (gradient,), (inputs, output, memory) = grads, ctx.kept
        ctx.kept = None
        if gradient is not None:
            ctx.slots.receive(ctx.loan, memory)
            torch.autograd.backward(output, gradient)
            ctx.slots.let_go(ctx.loan)
            ctx.leave()
        return None, None, None, None, None, *(one.grad for one in inputs)
