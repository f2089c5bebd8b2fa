"""Wrap calls of Megatron that expect one data iterator, for runs with a list of iterators, one for each model chunk.

Megatron's schedules take either. These calls around them do not, and a run with several chunks would end with an error.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine


def draw_from_every_chunk(dummy_train_step: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap Megatron's skipped step (``--iterations-to-skip``): the iterator of every chunk advances by one step.

    A chunk that reads no data has no iterator.
    """

    @wraps(dummy_train_step)
    def skip_step(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        machine = get_rerun_state_machine()
        while machine.should_run_forward_backward(data_iterator):
            for _ in range(get_num_microbatches()):
                for iterator in iterators:
                    if iterator is not None:
                        next(iterator)

    return skip_step


def save_first_chunks_loader(save_loader: Callable[..., None]) -> Callable[..., None]:
    """Wrap the saving of a data loader's state (``--dataloader-save``): chunk 0's is saved, since all chunks draw alike."""

    @wraps(save_loader)
    def save(train_iterator: Any, *args: Any, **kwargs: Any) -> None:
        save_loader(train_iterator[0] if isinstance(train_iterator, list) else train_iterator, *args, **kwargs)

    return save
