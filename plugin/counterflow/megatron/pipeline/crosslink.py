"""Full DualPipe: two data-parallel replicas, each laid out as a V, cross-linked into one pipeline.

A micro-batch that enters at replica A turns in replica B: A's ranks run its stages on the way there, B's those on the way
back, and its loss ends on B's first pipeline rank. B's micro-batches turn in A at the same time::

    replica A   rank 0: 0 3    rank 1: 1 2      stages; A's chunk 0 and B's chunk 1 run A's micro-batches,
    replica B   rank 0: 0 3    rank 1: 1 2      B's chunk 0 and A's chunk 1 run B's
    table       A.0  A.1  B.1  B.0              ranks 0 to 3 of the bidirectional layout

The replicas hold the same stages, as any two data-parallel peers do, so parameters, gradients, norms, optimizer shards and
checkpoints are Megatron's own. Two things differ: activations go to the partner's ranks (`link_pipelines`), and chunk 1 runs the
partner's micro-batches. So its data iterators are built as on the partner's data-parallel rank (`read_partners_data`), and no
label is ever sent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from counterflow.megatron.v_layout.model import is_for_way_back


def find_partner() -> int:
    """Return the data-parallel rank of the replica that this one is cross-linked with.

    It is half of all replicas away. Expert-parallel groups cover neighbouring ranks, so with an even number of
    expert-data-parallel replicas a group's ranks are all in A's or all in B's. With an odd number some groups have ranks of both.
    Their all-to-alls still match, because the two ranks of a pair run the same stages in the same order
    (`counterflow.trainer.tables`).
    """
    group = parallel_state.get_data_parallel_group()
    return int(group.rank() + group.size() // 2) % int(group.size())


def link_pipelines(pipeline: list[int]) -> tuple[list[int], int]:
    """Return the global ranks of the table's ranks, and this rank's place among them.

    ``pipeline`` lists the global ranks of this replica's own pipeline. The replica with the lower data-parallel rank is A. A's
    pipeline ranks are the first half of the table's ranks, B's in reverse order the second half.
    """
    group = parallel_state.get_data_parallel_group()
    replicas, partner = dist.get_process_group_ranks(group), find_partner()
    # Megatron deals ranks in a regular grid: the partner's pipeline is as far away at every pipeline rank.
    distance = replicas[partner] - replicas[group.rank()]
    others = [rank + distance for rank in pipeline]
    first, second = (pipeline, others) if group.rank() < partner else (others, pipeline)
    linked = first + second[::-1]
    return linked, linked.index(dist.get_rank())


@contextmanager
def hold_partners_data_rank() -> Iterator[None]:
    """Set the data-parallel rank in ``parallel_state`` to the partner's inside the block."""
    before = parallel_state._MPU_DATA_PARALLEL_RANK
    parallel_state.set_data_parallel_rank(find_partner())
    try:
        yield
    finally:
        parallel_state.set_data_parallel_rank(before)


def read_partners_data(build_iterators: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the builder of data iterators: those of chunk 1 draw the partner's samples.

    The samplers ask ``parallel_state`` for the data-parallel rank after the data set provider has returned, so the partner's rank
    is set until the iterators are built.
    """

    @wraps(build_iterators)
    def build(provider: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_for_way_back(provider):
            return build_iterators(provider, *args, **kwargs)
        with hold_partners_data_rank():
            return build_iterators(provider, *args, **kwargs)

    return build
