"""Process groups that only their own ranks open."""

import hashlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from counterflow.errors import SeamError
from counterflow.patching import Patches


def open_process_group(ranks: list[int], timeout: timedelta, name: str, backend: str | None = None) -> dist.ProcessGroup:
    """Open a process group for global ``ranks``, all of which have to call this; the others need not.

    The group's own name comes of ``ranks`` and ``name``. Torch would take in how many groups the calling rank is in (before
    2.14) or has opened: ranks of one pipeline may differ there, since Megatron has groups of first stages alone, and would then
    meet under different names and wait for each other for ever. Raises `SeamError` where torch does not take the name.
    """
    taken = set(distributed_c10d._world.pg_names.values())
    chosen = _digest(f"{name} {ranks}")
    while chosen in taken:
        chosen = _digest(chosen)
    patches = Patches()
    patches.set(distributed_c10d, "_process_group_name", lambda *_, **__: chosen)
    # Where ranks are bound to devices, NCCL would split this group from that of all ranks, and wait for all of them.
    patches.set(distributed_c10d, "_get_split_source", lambda *_: None)
    try:
        group = dist.new_group(ranks, timeout, backend=backend, use_local_synchronization=True, group_desc=name)
    finally:
        patches.undo()
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    if group.group_name != chosen:
        raise SeamError(
            "torch.distributed.distributed_c10d._process_group_name names no process groups: install torch 2.6 to 2.14"
        )
    return group


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
