"""The data of cross-linked replicas (`counterflow.trainer.crosslink`): chunk 1 reads the partner's.

Its data iterators are built as on the partner's data-parallel rank, so no label is ever sent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from megatron.core import parallel_state

from counterflow.megatron.v_layout.model import is_for_way_back
from counterflow.trainer import crosslink


def find_partner() -> int:
    """Return the data-parallel rank of the replica that this one is cross-linked with."""
    return crosslink.find_partner(parallel_state.get_data_parallel_group())


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
