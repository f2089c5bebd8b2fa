"""One process that stands for one rank of many, to find what a model holds: nobody else is there, and no tensor has data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def fake_group(rank: int, world: int) -> Iterator[None]:
    """Be a global rank of ``world`` ranks: a process group that answers each collective at once, with whatever is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *given, **named: new_group(*given, **{**named, "backend": "fake"})
    torch.distributed.init_process_group("fake", world_size=world, rank=rank, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        torch.distributed.new_group = new_group


class Kept:
    """What autograd keeps for a backward pass: storages, each once, but for those in ``own``."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what is kept meanwhile."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own:
                self._storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, _return):
            yield

    @property
    def size(self) -> int:
        """Bytes; what was freed since counts nothing."""
        return sum(storage.nbytes() for storage in self._storages.values())


def _return(tensor: Any) -> Any:
    return tensor
