"""One rank of two that open a process group, behind groups that the first alone is in."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from counterflow.groups import open_process_group

TIMEOUT = timedelta(seconds=10)


def run(argument: Any) -> None:
    """Open groups, and add in each that both ranks are in."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    is_first = dist.get_rank() == 0
    if is_first:
        open_process_group([0], TIMEOUT, "CF_FIRST")
    # Groups that all ranks open after it still have one name.
    add_up(dist.new_group([0, 1], TIMEOUT))
    if is_first:
        dist.new_group([0], TIMEOUT, use_local_synchronization=True)
    for _ in range(2):
        add_up(open_process_group([0, 1], TIMEOUT, "CF_TEST"))
    dist.destroy_process_group()


def add_up(group: Any) -> None:
    """Add over the two ranks."""
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    assert total.item() == 2
