"""Full DualPipe: two data-parallel replicas, each laid out as a V, cross-linked into one pipeline.

A micro-batch that enters at replica A turns in replica B: A's ranks run its stages on the way there, B's those on the way
back, and its loss ends on B's first pipeline rank. B's micro-batches turn in A at the same time::

    replica A   rank 0: 0 3    rank 1: 1 2      stages; A's chunk 0 and B's chunk 1 run A's micro-batches,
    replica B   rank 0: 0 3    rank 1: 1 2      B's chunk 0 and A's chunk 1 run B's
    table       A.0  A.1  B.1  B.0              ranks 0 to 3 of the bidirectional layout

The replicas hold the same stages, as any two data-parallel peers do, so parameters, gradients, norms, optimizer shards and
checkpoints are the trainer's own. Two things differ: activations go to the partner's ranks (`link_pipelines`), and chunk 1 runs
the partner's micro-batches, whose labels have to be where their losses are computed: an adapter reads the partner's samples
there, or the partner sends them (`Partner`).
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from counterflow.errors import OptionError, PipelineError
from counterflow.groups import open_process_group
from counterflow.schedule.families import list_names
from counterflow.schedule.layouts import V


def require_pairs(schedule: str | None, replicas: int, ranks: int) -> None:
    """Raise `OptionError` if ``replicas``, each of ``ranks`` ranks, do not make pairs."""
    if replicas % 2:
        raise OptionError(
            f"--cf-schedule {schedule} cross-links data-parallel replicas in pairs; this run has {replicas} "
            f"(replicas of {ranks} ranks): start an even number of replicas, or choose {' or '.join(list_names(V, pairs=True))}"
        )


def find_partner(replicas: dist.ProcessGroup) -> int:
    """Return the data-parallel rank of the replica that this one is cross-linked with; ``replicas`` is the data-parallel group.

    It is half of all replicas away. Expert-parallel groups cover neighbouring ranks, so with an even number of
    expert-data-parallel replicas a group's ranks are all in A's or all in B's. With an odd number some groups have ranks of both.
    Their all-to-alls still match, because the two ranks of a pair run the same stages in the same order
    (`counterflow.trainer.tables`).
    """
    return int(replicas.rank() + replicas.size() // 2) % int(replicas.size())


def link_pipelines(pipeline: list[int], replicas: dist.ProcessGroup) -> tuple[list[int], int]:
    """Return the global ranks of the table's ranks, and this rank's place among them.

    ``pipeline`` lists the global ranks of this replica's own pipeline, ``replicas`` is the data-parallel group. The replica with
    the lower data-parallel rank is A. A's pipeline ranks are the first half of the table's ranks, B's in reverse order the second
    half.
    """
    ranks, partner = dist.get_process_group_ranks(replicas), find_partner(replicas)
    # Trainers deal ranks in a regular grid: the partner's pipeline is as far away at every pipeline rank.
    distance = ranks[partner] - ranks[replicas.rank()]
    others = [rank + distance for rank in pipeline]
    first, second = (pipeline, others) if replicas.rank() < partner else (others, pipeline)
    linked = first + second[::-1]
    return linked, linked.index(dist.get_rank())


class Partner:
    """The rank at the same place of the partner replica, which has to call what this one calls."""

    def __init__(self, replicas: dist.ProcessGroup, timeout: timedelta) -> None:
        me, self._rank = (dist.get_process_group_ranks(replicas)[place] for place in (replicas.rank(), find_partner(replicas)))
        # Gloo, wherever ranks compute: on a GPU a collective can lie in a queue behind a receive that waits for what it brings.
        self._group = open_process_group(sorted((me, self._rank)), timeout, "CF_PARTNERS", backend="gloo")

    def deal(self, draw: Callable[[], Any], count: int) -> tuple[list[Any], list[Any]]:
        """Draw ``count`` micro-batches, pairs of inputs and labels, and give the partner their labels, which it needs.

        Return those that were drawn, for the first stage, and pairs of None and the partner's labels, for the last.
        """
        drawn = [draw() for _ in range(count)]
        return drawn, [(None, label) for label in self.swap([batch[1] for batch in drawn])]

    def swap(self, mine: Any, device: torch.device | None = None) -> Any:
        """Give any object, with tensors anywhere in it, and return the partner's; its tensors are on ``device``, or the CPU.

        Raises `PipelineError` if the partner is gone or late.
        """
        both: list[Any] = [None, None]
        try:
            dist.all_gather_object(both, _move(mine, torch.device("cpu")), self._group)
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0].partition(". ")[0]
            raise PipelineError(
                f"global rank {dist.get_rank()} waited for its partner, global rank {self._rank}: {first}"
            ) from error
        return _move(both[1 - self._group.rank()], device or torch.device("cpu"))


def _move(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().to(device) if torch.is_tensor(leaf) else leaf, tree)
