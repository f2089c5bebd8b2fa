"""Layers that move between pipeline ranks with all that a script did to them, before training: weights, freezing, groups.

Where a trainer builds a model before it knows of the schedule, some layers are on another rank than the schedule needs. They are
built anew there, and `move_layers` gives them the state of the layers that the script made.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from counterflow.errors import OptionError


class ParameterGroups:
    """The parameter groups that a script gave: tensors, or dictionaries as torch's optimizers take them."""

    def __init__(self, source: Iterable[Any] | None) -> None:
        self._source = source
        items = [] if source is None else list(source)
        self._is_plain = not any(isinstance(item, dict) for item in items)
        self._groups: list[dict[str, Any]] = [{"params": items}] if self._is_plain else items
        # By identity; the parameters themselves are kept, so that no other gets the number of one that is gone.
        self._places: dict[int, tuple[Any, int]] = {}
        for place, group in enumerate(self._groups):
            group["params"] = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
            for parameter in group["params"]:
                self.put(parameter, place)

    def find(self, parameter: Any) -> int | None:
        """Return the group of a parameter."""
        return self._places.get(id(parameter), (None, None))[1]

    def put(self, parameter: Any, place: int | None) -> None:
        """Note the group of a parameter."""
        if place is not None:
            self._places[id(parameter)] = parameter, place

    def regroup(self, parameters: Iterable[Any]) -> Any:
        """Put the parameters that this rank has now in the groups, in place; return the groups in the form that they had."""
        held = list(parameters)
        for place, group in enumerate(self._groups):
            group["params"] = [parameter for parameter in held if self.find(parameter) == place]
        if self._source is None:
            return None
        return self._groups[0]["params"] if self._is_plain else self._groups


class Move(NamedTuple):
    """A layer, or several that share a module, and the pipeline ranks that held it and that need it."""

    name: Hashable
    layer: int
    owner: int
    home: int


def list_moves(names: Sequence[Hashable], owners: Sequence[int], homes: Sequence[int]) -> list[Move]:
    """Return the layers that move, in order; layers of the same name share one module, which moves once to a rank."""
    holders: dict[Hashable, set[int]] = {}
    for name, owner in zip(names, owners, strict=True):
        holders.setdefault(name, set()).add(owner)
    moves = []
    for layer, (name, owner, home) in enumerate(zip(names, owners, homes, strict=True)):
        if home not in holders[name]:
            holders[name].add(home)
            moves.append(Move(name, layer, owner, home))
    return moves


def send_state(module: Any, receiver: int, group: dist.ProcessGroup, given: list[ParameterGroups]) -> None:
    """Send a layer's parameters and buffers, and the groups of its parameters, to global rank ``receiver``."""
    state = _list_state(module)
    header = {name: (tuple(one.shape), one.dtype, one.requires_grad, [g.find(one) for g in given]) for name, one in state.items()}
    dist.send_object_list([header], receiver, group)
    for tensor in state.values():
        dist.send(tensor.detach().contiguous(), receiver, group)


def receive_state(module: Any, sender: int, group: dist.ProcessGroup, given: list[ParameterGroups], device: torch.device) -> None:
    """Receive what `send_state` sends into a layer that was built anew. Raises `OptionError` if it holds other tensors."""
    box: list[Any] = [None]
    dist.recv_object_list(box, sender, group)
    state = _list_state(module)
    if set(state) != set(box[0]):
        raise OptionError(
            f"a layer of type {type(module).__name__} holds {', '.join(sorted(box[0]))} on one rank and "
            f"{', '.join(sorted(state))} where it is built anew: its LayerSpec must build what the model holds"
        )
    for name, (shape, dtype, is_trained, places) in box[0].items():
        buffer = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(buffer, sender, group)
        state[name].data = buffer
        if isinstance(state[name], nn.Parameter):
            state[name].requires_grad_(is_trained)
        for groups, place in zip(given, places, strict=True):
            groups.put(state[name], place)


def _list_state(module: Any) -> dict[str, torch.Tensor]:
    """Return a layer's parameters and buffers by name; none of a layer that is a plain function."""
    return dict([*module.named_parameters(), *module.named_buffers()]) if isinstance(module, nn.Module) else {}
