"""The way back of a V: build and run model chunk 1 as if this pipeline rank were P-1-r.

Megatron deals virtual stages round by round, so chunk 1 of rank P-1-r is stage P + (P-1-r): exactly
the stage that a V layout wants on rank r. Megatron reads the rank from two places: a process group that
is passed along, and ``parallel_state``. Both are overridden together, while chunk 1 and its data sets are built
and during its forward passes, but never during collectives of the optimizer or of a checkpoint.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from megatron.core import parallel_state


class MirroredGroup:
    """A pipeline process group whose ``rank()`` is P-1-r; all other attributes are those of the group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def rank(self) -> int:
        """Return the mirrored rank."""
        return int(self._group.size() - 1 - self._group.rank())

    def size(self) -> int:
        """Return the number of pipeline ranks."""
        return int(self._group.size())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


@contextmanager
def hold_mirrored_rank() -> Iterator[None]:
    """Set the pipeline rank in ``parallel_state`` to P-1-r inside the block; a nested block changes nothing."""
    group = parallel_state.get_pipeline_model_parallel_group()
    before = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK
    mirrored = group if isinstance(group, MirroredGroup) else MirroredGroup(group)
    parallel_state.set_pipeline_model_parallel_rank(mirrored.rank())
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(before)


@contextmanager
def hold_mirrored_group() -> Iterator[None]:
    """Let ``parallel_state`` return the mirrored pipeline group inside the block, for builders that are passed no groups."""
    before = parallel_state._PIPELINE_MODEL_PARALLEL_GROUP
    parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = MirroredGroup(before)
    try:
        yield
    finally:
        parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = before


def run_mirrored(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` so that it runs under the mirrored rank; its attributes stay."""

    @wraps(function)
    def mirrored(*args: Any, **kwargs: Any) -> Any:
        with hold_mirrored_rank():
            return function(*args, **kwargs)

    return mirrored


def mirror_collection(pg_collection: Any) -> Any:
    """Return a copy of a process-group collection whose pipeline group is mirrored."""
    mirrored = copy.copy(pg_collection)
    mirrored.pp = MirroredGroup(pg_collection.pp)
    return mirrored
