"""One MoE layer's slots: which expert each holds, how tokens are split over them, and where loads are reported."""

from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.exact import add_shared_slots, plan_exact
from counterflow.balance.placement import Placement, make_home_placement, sum_by_rank
from counterflow.balance.shares import share_tokens
from counterflow.devices import find_device
from counterflow.moe.clones import Clones, LayerExperts
from counterflow.moe.just_in_time import JustInTime, Loan, is_in_backward
from counterflow.moe.loads import LoadTracker, sum_by_tier
from counterflow.moe.notices import notice
from counterflow.moe.slots import SlotTable, find_slots, make_slot_table, place_evenly, place_exactly, spread_evenly


@dataclass
class Dealt:
    """What the micro-batch that a layer runs was dealt: the slot table, and what is cloned for it alone, if anything."""

    table: SlotTable
    loan: Loan | None = None


class LayerSlots:
    """One MoE layer's slots on this rank, as on every rank: ``homes`` home slots, ``clones`` clone slots, then ``shared`` ones.

    Shared slots are for just-in-time clones, which are planned in those that the layer's placement does not have, and for
    resident ones in those that it has. They are empty until `lend_by` was called.

    The tokens of all ranks of ``sources`` are split together; ``rank_of_source[i]`` is the expert-parallel rank of source i. An
    adapter overrides `list_experts`. Every token goes to its expert's home until `connect` was called and clones are planned.
    """

    _is_seen_in_forward = False
    number = 1
    """The layer's number in the model, from 1."""
    is_sent_early = False
    """Whether gradients of resident clones are complete as their backward ends, and the adapter says so by `send_home`."""
    is_forced = False
    """Whether tokens go to all experts alike, whatever the router chose: for a measurement without gradients."""

    def __init__(
        self, homes: int, clones: int, sources: dist.ProcessGroup, rank_of_source: Array, *, is_exact: bool, shared: int = 0
    ) -> None:
        self._own, self._per_rank, self._shared = homes, clones, shared
        self._group, self._rank_of_source, self._is_exact = sources, rank_of_source, is_exact
        self._tracker: LoadTracker | None = None
        self._clones: Clones | None = None
        self._index = self._clones_index = 0
        ranks = int(rank_of_source[-1]) + 1
        self._just_in_time: JustInTime | None = None
        # Plans of forwards without gradients, which the backward may run again, by the counts of their micro-batches.
        self._plans: dict[bytes, Placement] = {}
        self.hold(make_home_placement(1, homes * ranks, ranks, clones), find_device())

    def list_experts(self) -> LayerExperts:
        """Return the parameters of this rank's slots."""
        raise NotImplementedError

    @property
    def is_training(self) -> bool:
        """Whether the layer trains. Loads are counted only if it does and gradients are on."""
        return True

    def refer_to(self, layer: Any) -> None:
        """Note the trainer's layer, weakly: slots are the values of a weak-keyed table whose key is the layer."""
        self._find_layer = ref(layer)

    @property
    def layer(self) -> Any:
        """The trainer's layer."""
        layer = self._find_layer()
        assert layer is not None
        return layer

    def is_first_pass(self, is_training: bool) -> bool:
        """Tell whether a layer trains, and what it is given is not recomputed in a backward.

        What a checkpoint recomputes counts only if its forward had no gradients, and so was not counted.
        """
        self._is_seen_in_forward |= is_training and torch.is_grad_enabled() and not is_in_backward()
        return is_training and not (is_in_backward() and self._is_seen_in_forward)

    def connect(self, tracker: LoadTracker, index: int, clones: Clones, clones_index: int) -> None:
        """Set the load tracker and the clones, with this layer's index in each."""
        self._tracker, self._index, self._clones, self._clones_index = tracker, index, clones, clones_index

    def lend_by(self, just_in_time: JustInTime, prices: tuple[int, int]) -> None:
        """Fill shared slots; just-in-time clones are planned at these prices (`plan_exact`)."""
        self._just_in_time, self._prices = just_in_time, prices

    def hold(self, placement: Placement, device: torch.device) -> None:
        """Use ``placement``, which has one layer: this one. Its last clone slots may be shared ones; those it lacks are empty."""
        missing = self._own + self._per_rank + self._shared - placement.cluster.slots_per_rank[0]
        placement, self._is_free = add_shared_slots(placement, missing)
        self._table = make_slot_table(placement, device)
        self.dealt = Dealt(self._table)
        self._plans.clear()

    def deal(self, probs: torch.Tensor, routing_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Map tokens from experts to slots: return probabilities and routing map, ``[tokens, slots]``, and the shares.

        Both arguments are ``[tokens, experts]``. The shares, ``int64[sources, slots]``, are the tokens that each source sends to
        each slot. The exact split computes them from the counts of all sources; under the even split they are None.
        """
        is_counted = self.is_training and torch.is_grad_enabled() and self._tracker is not None
        if self.is_forced:
            routing_map = spread_evenly(routing_map, self._group.rank())
        own = routing_map.sum(0)
        self.dealt.table, self.dealt.loan = self._table, None
        if not self._is_exact:
            if is_counted:
                self._tracker.add_own(self._index, own)  # type: ignore[union-attr]
            slot_map, slot_probs = place_evenly(routing_map, probs, self._table)
            return slot_probs, slot_map, None
        gathered = own.new_empty(self._group.size() * len(own))
        dist.all_gather_into_tensor(gathered, own, self._group)
        counts = gathered.view(self._group.size(), -1).cpu().numpy()
        if self._just_in_time is not None:
            planned = self._plan(counts.sum(0))
            if planned is not self._table.placement:
                self.dealt.table = make_slot_table(planned, routing_map.device)
        table = self.dealt.table
        shares = share_tokens(counts, table.placement, self._rank_of_source)
        if self._just_in_time is not None:
            is_used = shares.any(0)
            self.dealt.loan = self._just_in_time.lend(self._index, table.placement, is_used, self._own + self._per_rank)
        if is_counted:
            tokens, cluster = shares.sum(0), table.placement.cluster
            tiers = sum_by_tier(tokens, table.placement, self._table.placement)
            self._tracker.add(self._index, counts.sum(0), sum_by_rank(tokens, cluster), tiers)  # type: ignore[union-attr]
        slot_map, slot_probs = place_exactly(routing_map, probs, table, shares[self._group.rank()])
        return slot_probs, slot_map, torch.from_numpy(shares).to(routing_map.device, non_blocking=True)

    def _plan(self, counts: Array) -> Placement:
        """Return the placement of a micro-batch; a forward that the backward runs again gets the same."""
        if not self._is_free.any():
            return self._table.placement
        key = counts.tobytes()
        if is_in_backward() and key in self._plans:
            return self._plans.pop(key)
        own = self._table.placement
        planned = plan_exact(counts[None], own, self._is_free, self._prices).placement
        if (planned.experts == own.experts).all():
            planned = own
        if self.is_training and not torch.is_grad_enabled():
            self._plans[key] = planned
        return planned

    def deal_selected(self, selected: torch.Tensor) -> torch.Tensor:
        """Map tokens from experts to slots where a router names the experts of a token: return slots, ``int64[tokens, k]``.

        ``selected``, ``int64[tokens, k]``, has k different experts for each token.
        """
        assert self._table.placement.homes is not None
        routed = selected.new_zeros(len(selected), self._table.placement.homes.shape[1], dtype=torch.bool)
        routed.scatter_(1, selected, True)
        slot_map = self.deal(routed, routed)[1]
        return find_slots(selected, slot_map, self.dealt.table)

    def begin_step(self) -> None:
        """Forget what a step left that did not end."""
        self._plans.clear()

    def recall(self, loan: Loan | None, output: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's output; at its gradient the weights of its loan are sent again."""
        if loan is None or self._just_in_time is None:
            return output
        return self._just_in_time.recall(loan, output)[0]

    def give_back(self, loan: Loan | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the input of just-in-time clones, elsewhere the output of the experts: at its gradient the loan's go home."""
        return tensors if loan is None or self._just_in_time is None else self._just_in_time.give_back(loan, *tensors)

    def send_home(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the input of resident clones, on a rank where they have no tokens the output of the homes.

        At its gradient, in a step's last backward of this layer, gradients of resident clones go home.
        """
        clones = self._find_leaving()
        return tensors if clones is None else notice(partial(clones.note_backward, self._clones_index), *tensors)

    def pass_on(self, loan: Loan | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return the input of the experts: at its gradient the homes have computed theirs.

        Then what modules of the homes keep of them is handed over: those of a step's first micro-batch may overwrite what is
        there, and so have to come before what clones add. Behind that the next gradients of resident clones may leave.
        """
        if (clones := self._find_leaving()) is not None:
            (tokens,) = notice(clones.note_end, tokens)
        return tokens if loan is None else notice(self.leave_weight_grads, tokens)[0]

    def _find_leaving(self) -> Clones | None:
        """Return the resident clones if gradients of this layer's may leave before the step ends."""
        clones = self._clones if self.is_sent_early else None
        return clones if clones is not None and clones.has_any(self._clones_index) else None

    def leave_weight_grads(self) -> None:
        """Hand over the weight gradients that modules of the homes keep of their own accord; by default there are none."""

    def finish_refresh(self) -> bool:
        """Wait for the clones' weights before the clones compute; tell whether any were sent in this step."""
        return self._clones is not None and self._clones.finish_refresh(self._clones_index)
