"""Where Megatron takes the data iterators of several model chunks, a list, for one iterator.

Its schedules take either; these calls around them do not, and end a run of several chunks in the middle.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine


def draw_from_every_chunk(dummy_train_step: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap the step that stands for a skipped one (``--iterations-to-skip``): every chunk's iterator goes on by a step.

    A stage that reads no data has no iterator; whoever has one draws what its forwards would have drawn.
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
    """Wrap what saves the state of a data loader (``--dataloader-save``): chunk 0's, the others have drawn as much."""

    @wraps(save_loader)
    def save(train_iterator: Any, *args: Any, **kwargs: Any) -> None:
        save_loader(train_iterator[0] if isinstance(train_iterator, list) else train_iterator, *args, **kwargs)

    return save
