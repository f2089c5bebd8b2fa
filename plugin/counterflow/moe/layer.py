"""One MoE layer's slots: which expert each holds, how tokens are split over them, and where loads are reported."""

import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.balance.placement import Placement, make_home_placement, sum_by_rank
from counterflow.balance.shares import share_tokens
from counterflow.devices import find_device
from counterflow.moe.clones import Clones, LayerExperts
from counterflow.moe.loads import LoadTracker, sum_by_tier
from counterflow.moe.slots import find_slots, make_slot_table, place_evenly, place_exactly


class LayerSlots:
    """One MoE layer's slots on this rank: first ``homes`` home slots, then ``clones`` clone slots, as on every rank.

    The tokens of all ranks of ``sources`` are split together; ``rank_of_source[i]`` is the expert-parallel rank of source i. An
    adapter overrides `list_experts`. Every token goes to its expert's home until `connect` was called and clones are planned.
    """

    number = 1
    """The layer's number in the model, from 1."""

    def __init__(self, homes: int, clones: int, sources: dist.ProcessGroup, rank_of_source: Array, *, is_exact: bool) -> None:
        self._own, self._per_rank = homes, clones
        self._group, self._rank_of_source, self._is_exact = sources, rank_of_source, is_exact
        self._tracker: LoadTracker | None = None
        self._clones: Clones | None = None
        self._index = self._clones_index = 0
        ranks = int(rank_of_source[-1]) + 1
        self._table = make_slot_table(make_home_placement(1, homes * ranks, ranks, clones), find_device())

    def list_experts(self) -> LayerExperts:
        """Return the parameters of this rank's slots."""
        raise NotImplementedError

    @property
    def is_training(self) -> bool:
        """Whether the layer trains. Loads are counted only if it does and gradients are on."""
        return True

    def connect(self, tracker: LoadTracker, index: int, clones: Clones, clones_index: int) -> None:
        """Set the load tracker and the clones, with this layer's index in each."""
        self._tracker, self._index, self._clones, self._clones_index = tracker, index, clones, clones_index

    def hold(self, placement: Placement, device: torch.device) -> None:
        """Use ``placement``, which has one layer: this one."""
        self._table = make_slot_table(placement, device)

    def deal(self, probs: torch.Tensor, routing_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Map tokens from experts to slots: return probabilities and routing map, ``[tokens, slots]``, and the shares.

        Both arguments are ``[tokens, experts]``. The shares, ``int64[sources, slots]``, are the tokens that each source sends to
        each slot. The exact split computes them from the counts of all sources; under the even split they are None.
        """
        is_counted = self.is_training and torch.is_grad_enabled() and self._tracker is not None
        own = routing_map.sum(0)
        if not self._is_exact:
            if is_counted:
                self._tracker.add_own(self._index, own)  # type: ignore[union-attr]
            slot_map, slot_probs = place_evenly(routing_map, probs, self._table)
            return slot_probs, slot_map, None
        gathered = own.new_empty(self._group.size() * len(own))
        dist.all_gather_into_tensor(gathered, own, self._group)
        counts = gathered.view(self._group.size(), -1).cpu().numpy()
        shares = share_tokens(counts, self._table.placement, self._rank_of_source)
        if is_counted:
            tokens, placement = shares.sum(0), self._table.placement
            tiers = sum_by_tier(tokens, placement, self._table.placement)
            self._tracker.add(self._index, counts.sum(0), sum_by_rank(tokens, placement.cluster), tiers)  # type: ignore[union-attr]
        slot_map, slot_probs = place_exactly(routing_map, probs, self._table, shares[self._group.rank()])
        return slot_probs, slot_map, torch.from_numpy(shares).to(routing_map.device, non_blocking=True)

    def deal_selected(self, selected: torch.Tensor) -> torch.Tensor:
        """Map tokens from experts to slots where a router names the experts of a token: return slots, ``int64[tokens, k]``.

        ``selected``, ``int64[tokens, k]``, has k different experts for each token.
        """
        assert self._table.placement.homes is not None
        routed = selected.new_zeros(len(selected), self._table.placement.homes.shape[1], dtype=torch.bool)
        routed.scatter_(1, selected, True)
        return find_slots(selected, self.deal(routed, routed)[1], self._table)

    def finish_refresh(self) -> bool:
        """Wait for the clones' weights before the clones compute; tell whether any were sent in this step."""
        return self._clones is not None and self._clones.finish_refresh(self._clones_index)
