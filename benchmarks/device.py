"""An emulated device: experts that sleep per token and links that sleep per byte, under a real training on CPU ranks.

The training is Megatron's, with real process groups, clones and an optimizer; only the device's speed and the router's choice
are put in its place. What computes sleeps in the thread that computes, forward and backward; an all-to-all sleeps behind the real
one; a transfer of weights or gradients goes on beside the computation, and whoever waits for it sleeps for what is left. Every
rank has one link that sends and one that receives at a time. All sleeps are stretched by one factor, so that what the CPU does
beside them is small; ratios stay.

Every rank also keeps a clock of the device, which counts what it sleeps for, without the stretch and without what the CPU does:
messages carry the sender's clock, and an all-to-all sets all clocks to the latest. So a busy machine changes the time that a step
takes, but not what the clock says of it. Beside the clock goes an account of its seconds by cause. It is set with the clock to
that of the latest rank, so it says what the ranks that held up the others did.
"""

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from counterflow.arrays import Array
from counterflow.patching import Patches

# Of an expert's time for a token: forward, backward.
FORWARD_SHARE, BACKWARD_SHARE = 1 / 3, 2 / 3
# Tags of the messages that say when a transfer was posted; above all others.
STAMP_TAG = 2**30
# What an account has: computing, all-to-alls, and waits for transfers, by the function that posted them.
COMPUTE, ALL_TO_ALL, OTHER = "compute", "all-to-all", "other"
WAITS = {
    "JustInTime._start_sending": "just-in-time weights",
    "JustInTime._start_round": "just-in-time gradients",
    "Clones.refresh": "resident weights",
    "Clones._start_round": "resident gradients",
    "move_homes": "homes",
}
CAUSES = (COMPUTE, ALL_TO_ALL, *WAITS.values(), OTHER)


@dataclass(frozen=True)
class Speeds:
    """What is emulated; times in seconds of the real device, sizes in bytes.

    ``token_time``: an expert's forward and backward for one token. ``token_bytes``: a token's size in an all-to-all.
    ``expert_bytes``: an expert's weights in half precision; ``weights``: how many numbers that is in the model that trains.
    ``node_speed``, ``network_speed``: bytes a second of a rank's links. ``node_of_rank``: the nodes. ``stretch``: by how much
    sleeps are longer than on the device; with 0 nothing sleeps, and the clock alone counts.
    """

    token_time: float
    token_bytes: float
    expert_bytes: float
    weights: int
    node_speed: float
    network_speed: float
    node_of_rank: tuple[int, ...]
    stretch: float

    def time_links(self, sizes: Array, rank: int) -> float:
        """Return the seconds in which ``sizes``, ``float64[ranks]`` bytes from or to each rank, go through a link."""
        nodes = np.asarray(self.node_of_rank)
        own, near = np.arange(len(nodes)) == rank, nodes == nodes[rank]
        return float(sizes[near & ~own].sum() / self.node_speed + sizes[~near].sum() / self.network_speed)


@dataclass
class Note:
    """What a rank saw of a layer in a micro-batch: its clock as it entered and left, forward and backward; tokens it computed."""

    entered: float = 0.0
    left: float = 0.0
    entered_back: float = 0.0
    left_back: float = 0.0
    tokens: int = 0


class Device:
    """One rank's device: its ``clock`` in seconds, its sleeps, once it `is_on`, and notes of the rank's layers.

    ``account``, ``float64[causes]``, are the clock's seconds by one of `CAUSES`.
    """

    def __init__(self, speeds: Speeds) -> None:
        self.speeds, self.is_on, self.clock = speeds, False, 0.0
        self.account = np.zeros(len(CAUSES))
        self.notes: list[Note] = []
        # When each link is free again: the one that receives, the one that sends.
        self.free = {"receives": 0.0, "sends": 0.0}

    def advance(self, seconds: float, cause: str) -> None:
        """Let so much time pass, for one of `CAUSES`."""
        self.clock += seconds
        self.account[CAUSES.index(cause)] += seconds
        if self.is_on and seconds > 0:
            time.sleep(seconds * self.speeds.stretch)

    def compute(self, tokens: int, share: float) -> None:
        """Take the time of a share of an expert's work on so many tokens."""
        self.advance(tokens * self.speeds.token_time * share, COMPUTE)

    def meet(self, group: Any = None) -> None:
        """Set the clocks of a group to the latest of them, with its account: its ranks have waited for each other."""
        own = torch.tensor([self.clock, *self.account], dtype=torch.float64)
        gathered = torch.empty(dist.get_world_size(group) * len(own), dtype=torch.float64)
        dist.all_gather_into_tensor(gathered, own, group)
        rows = gathered.view(-1, len(own)).numpy()
        self.clock, self.account = float(rows[:, 0].max()), rows[rows[:, 0].argmax(), 1:].copy()

    def occupy(self, link: str, begin: float, tensors: list[torch.Tensor], peer: int) -> float:
        """Return when a transfer ends that has begun, or that waits until its link is free."""
        speeds = self.speeds
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) * speeds.expert_bytes / (2 * speeds.weights)
        sizes = np.zeros(len(speeds.node_of_rank))
        sizes[peer] = size
        self.free[link] = max(begin, self.free[link]) + speeds.time_links(sizes, dist.get_rank())
        return self.free[link]


class Transfer:
    """The real transfers of a batch between this rank and the others, and when they would have ended on the device."""

    def __init__(
        self,
        device: Device,
        works: list[Any],
        operations: list[Any],
        stamps: dict[int, tuple[Any, torch.Tensor]],
        cause: str,
    ) -> None:
        self._device, self._works, self._operations, self._stamps, self._cause = device, works, operations, stamps, cause
        self._posted, self._end = device.clock, 0.0
        for peer, tensors in _group(operations, dist.isend).items():
            self._end = max(self._end, device.occupy("sends", self._posted, tensors, peer))

    def wait(self, *limit: timedelta) -> None:
        """Wait for the real transfers, then for the device's; a second call finds both at their end."""
        for work in self._works:
            work.wait(*limit)
        self._works = []
        for peer, tensors in _group(self._operations, dist.irecv).items():
            work, stamp = self._stamps[peer]
            work.wait(*limit)
            begin = max(self._posted, float(stamp))
            self._end = max(self._end, self._device.occupy("receives", begin, tensors, peer))
        self._operations = []
        self._device.advance(max(0.0, self._end - self._device.clock), self._cause)

    def is_completed(self) -> bool:
        """Tell whether both are at their end; a transfer whose begin is not known yet is not."""
        return not self._works and not self._operations and self._end <= self._device.clock


class Late:
    """One of a batch's transfers; waiting for one waits for all of them."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def wait(self, *limit: timedelta) -> None:
        """Wait."""
        self._transfer.wait(*limit)

    def is_completed(self) -> bool:
        """Tell whether the batch is at its end."""
        return self._transfer.is_completed()


def _group(operations: list[Any], kind: Any) -> dict[int, list[torch.Tensor]]:
    """Return the tensors of one kind of operation by the other rank."""
    grouped: dict[int, list[torch.Tensor]] = {}
    for one in operations:
        if one.op is kind:
            grouped.setdefault(one.peer, []).append(one.tensor)
    return grouped


def delay_transfers(device: Device, send: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``dist.batch_isend_irecv``: what is sent takes the device's time.

    Each sender says when it has posted, since a transfer cannot begin earlier.
    """

    @wraps(send)
    def send_late(operations: list[Any]) -> list[Any]:
        cause = WAITS.get(sys._getframe(1).f_code.co_qualname, OTHER)
        now = torch.tensor([device.clock], dtype=torch.float64)
        stamps: dict[int, torch.Tensor] = {}
        extra = []
        for kind in (dist.isend, dist.irecv):
            for peer in _group(operations, kind):
                stamp = now if kind is dist.isend else stamps.setdefault(peer, torch.zeros(1, dtype=torch.float64))
                same = [one for one in operations if one.op is kind and one.peer == peer]
                extra.append(dist.P2POp(kind, stamp, peer, same[0].group, STAMP_TAG + min(one.tag for one in same)))
        works = send([*operations, *extra])
        receiving = [one.peer for one in extra if one.op is dist.irecv]
        first = len(works) - len(receiving)
        late = {peer: (work, stamps[peer]) for peer, work in zip(receiving, works[first:], strict=True)}
        transfer = Transfer(device, works[:first], operations, late, cause)
        return [Late(transfer)] * len(operations)

    return send_late


def delay_all_to_all(device: Device, exchange: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``dist.all_to_all_single``: tokens take the device's time, the longer of what is sent and what is received."""

    @wraps(exchange)
    def exchange_late(
        output: Any, given: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        work = exchange(output, given, output_split_sizes, input_split_sizes, **kwargs)
        if given.dim() == 2 and given.shape[1] > 1 and output_split_sizes is not None:
            speeds, rank = device.speeds, dist.get_rank()
            sizes = (np.array([int(rows) for rows in split]) for split in (output_split_sizes, input_split_sizes))
            device.meet(kwargs.get("group"))
            device.advance(max(speeds.time_links(rows * speeds.token_bytes, rank) for rows in sizes), ALL_TO_ALL)
        return work

    return exchange_late


class _Slow(torch.autograd.Function):
    """Passes a tensor on; its backward takes the time of an expert's backward."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, device: Device, tokens: int) -> torch.Tensor:
        ctx.device, ctx.tokens = device, tokens
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.device.compute(ctx.tokens, BACKWARD_SHARE)
        return gradient, None, None


def slow_experts(device: Device, run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a module of experts, homes' and clones' alike: each token takes its time, forward and backward."""

    @wraps(run)
    def run_slowly(experts: Any, tokens: Any, tokens_per_expert: Any, *args: Any, **kwargs: Any) -> Any:
        count = len(tokens)
        device.notes[-1].tokens += count
        output, bias = run(experts, tokens, tokens_per_expert, *args, **kwargs)
        device.compute(count, FORWARD_SHARE)
        return _Slow.apply(output, device, count), bias

    return run_slowly


def watch_layer(device: Device, run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``MoELayer.forward``: note when a rank enters and leaves a layer, forward and backward."""

    @wraps(run)
    def run_watched(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note = Note(entered=device.clock)
        device.notes.append(note)
        output, *rest = run(layer, hidden_states, *args, **kwargs)
        note.left = device.clock
        if output.requires_grad:
            for tensor, name in ((output, "entered_back"), (hidden_states, "left_back")):
                tensor.register_hook(partial(_note_time, device, note, name))
        return output, *rest

    return run_watched


def _note_time(device: Device, note: Note, name: str, gradient: torch.Tensor) -> None:
    setattr(note, name, device.clock)


class Routes:
    """Routes the tokens of this rank such that all ranks' tokens are ``counts``, ``int64[micro-batches, layers, experts]``.

    A micro-batch has ``tokens`` tokens over all ``ranks``. An expert's tokens come from all ranks alike.
    """

    def __init__(self, counts: Array, tokens: int, rank: int, ranks: int) -> None:
        self._counts, self._tokens, self._rank, self._ranks = counts, tokens, rank, ranks
        self._turn = 0

    def draw(self) -> torch.Tensor:
        """Return the next layer's map, ``bool[own tokens, experts]``."""
        batch, layer = divmod(self._turn, self._counts.shape[1])
        self._turn += 1
        routed = route_counts(self._counts[batch, layer], self._tokens)
        return torch.from_numpy(routed[self._rank :: self._ranks].copy())

    def wrap_routing(self, route: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``TopKRouter.routing``: scores are the router's own, the experts are those that are drawn."""

        @wraps(route)
        def route_as_drawn(router: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            scores = torch.sigmoid(logits.view(-1, logits.shape[-1]).float())
            routing_map = self.draw()
            chosen = scores.masked_fill(~routing_map, 0.0)
            return (chosen / chosen.sum(1, keepdim=True)).to(logits.dtype), routing_map

        return route_as_drawn


def route_counts(counts: Array, tokens: int) -> Array:
    """Return ``bool[tokens, experts]`` with ``counts[experts]`` tokens for each expert, as many experts for every token."""
    routed = np.zeros((tokens, len(counts)), np.bool_)
    expert = np.repeat(np.arange(len(counts)), counts)
    routed[np.arange(len(expert)) % tokens, expert] = True
    return routed


def cap_counts(counts: Array, most: int) -> Array:
    """Return ``counts[..., experts]`` with at most ``most`` for each expert: what is above goes to those that have least."""
    capped = counts.copy()
    for row in capped.reshape(-1, capped.shape[-1]):
        over = int(np.maximum(row - most, 0).sum())
        np.minimum(row, most, out=row)
        while over:
            least = int(row.argmin())
            given = min(over, max(1, over // 8), most - int(row[least]))
            row[least] += given
            over -= given
    return capped


@contextmanager
def emulate(device: Device, routes: Routes) -> Any:
    """Put the device and the routes in their places, inside the block."""
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter

    patches = Patches()
    patches.set(dist, "batch_isend_irecv", delay_transfers(device, dist.batch_isend_irecv))
    patches.set(dist, "all_to_all_single", delay_all_to_all(device, dist.all_to_all_single))
    patches.set(SequentialMLP, "forward", slow_experts(device, SequentialMLP.forward))
    patches.set(MoELayer, "forward", watch_layer(device, MoELayer.forward))
    patches.set(TopKRouter, "routing", routes.wrap_routing(TopKRouter.routing))
    try:
        yield device
    finally:
        patches.undo()
