"""An emulated device: experts that sleep per token and links that sleep per byte, under a real training on CPU ranks.

The training is Megatron's, with real process groups, clones and an optimizer; only the device's speed and the router's choice
are put in its place. What computes sleeps in the thread that computes, forward and backward; an all-to-all sleeps behind the real
one; a transfer of weights or gradients goes on beside the computation, and whoever waits for it sleeps for what is left. Every
rank has one link that sends and one that receives at a time. All times are stretched by one factor, so that what the CPU does
beside them is small; ratios stay.
"""

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


@dataclass(frozen=True)
class Speeds:
    """What is emulated; times in seconds of the real device, sizes in bytes.

    ``token_time``: an expert's forward and backward for one token. ``token_bytes``: a token's size in an all-to-all.
    ``expert_bytes``: an expert's weights in half precision; ``weights``: how many numbers that is in the model that trains.
    ``node_speed``, ``network_speed``: bytes a second of a rank's links. ``node_of_rank``: the nodes. ``stretch``: by how much
    everything takes longer than on the device.
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
        """Return the stretched seconds in which ``sizes``, ``float64[ranks]`` bytes from or to each rank, go through a link."""
        nodes = np.asarray(self.node_of_rank)
        own, near = np.arange(len(nodes)) == rank, nodes == nodes[rank]
        times = sizes[near & ~own].sum() / self.node_speed + sizes[~near].sum() / self.network_speed
        return float(times) * self.stretch


@dataclass
class Note:
    """What a rank saw of a layer in a micro-batch: when it entered and left it, forward and backward; tokens it computed."""

    entered: float = 0.0
    left: float = 0.0
    entered_back: float = 0.0
    left_back: float = 0.0
    tokens: int = 0


class Device:
    """Sleeps for one rank, from the moment that it `is_on`, and notes what the rank's layers did."""

    def __init__(self, speeds: Speeds) -> None:
        self.speeds, self.is_on = speeds, False
        self.notes: list[Note] = []
        # When each link is free again: the one that receives, the one that sends.
        self.free = {"receives": 0.0, "sends": 0.0}

    def sleep(self, seconds: float) -> None:
        """Sleep so many stretched seconds."""
        if self.is_on and seconds > 0:
            time.sleep(seconds)

    def compute(self, tokens: int, share: float) -> None:
        """Take the time of a share of an expert's work on so many tokens."""
        self.sleep(tokens * self.speeds.token_time * share * self.speeds.stretch)

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
        self, device: Device, works: list[Any], operations: list[Any], stamps: dict[int, tuple[Any, torch.Tensor]]
    ) -> None:
        self._device, self._works, self._operations, self._stamps = device, works, operations, stamps
        self._posted, self._end = time.monotonic(), 0.0
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
        if self._device.is_on:
            time.sleep(max(0.0, self._end - time.monotonic()))

    def is_completed(self) -> bool:
        """Tell whether both are at their end; a transfer whose begin is not known yet is not."""
        return not self._works and not self._operations and self._end <= time.monotonic()


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

    Each sender says when it has posted, since a transfer cannot begin earlier. Clocks of processes on one machine are the same.
    """

    @wraps(send)
    def send_late(operations: list[Any]) -> list[Any]:
        now = torch.tensor([time.monotonic()], dtype=torch.float64)
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
        transfer = Transfer(device, works[:first], operations, late)
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
            device.sleep(max(speeds.time_links(rows * speeds.token_bytes, rank) for rows in sizes))
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
        note = Note(entered=time.monotonic())
        device.notes.append(note)
        output, *rest = run(layer, hidden_states, *args, **kwargs)
        note.left = time.monotonic()
        if output.requires_grad:
            for tensor, name in ((output, "entered_back"), (hidden_states, "left_back")):
                tensor.register_hook(partial(_note_time, note, name))
        return output, *rest

    return run_watched


def _note_time(note: Note, name: str, gradient: torch.Tensor) -> None:
    setattr(note, name, time.monotonic())


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
