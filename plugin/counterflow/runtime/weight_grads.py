"""Weight-gradient work that an I leaves for its W.

A backward that can compute its weight gradients later passes that work to `defer_weight_grad`. In a B, and outside a schedule,
the work runs at once. In an I the executor keeps it (`hold_weight_grads`) until the table's W.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# One queue of the whole process, not of a thread: on a GPU, autograd runs backward functions in threads of its own.
_held: list[Callable[[], None]] | None = None
# Wraps work as it is kept for later, while a profiler notes whose it is.
_note: Callable[[Callable[[], None]], Callable[[], None]] | None = None


def defer_weight_grad(fn: Callable[[], None]) -> None:
    """Run ``fn``, which computes a weight's gradient and adds it to the gradient buffer: at once in a B, at the W in an I."""
    if _held is None:
        fn()
    else:
        _held.append(fn if _note is None else _note(fn))


def note_weight_grads(note: Callable[[Callable[[], None]], Callable[[], None]] | None) -> None:
    """Let ``note`` wrap all work that is kept for later from now on; None ends it."""
    global _note
    _note = note


def is_holding() -> bool:
    """Tell whether work that is deferred now waits for a W."""
    return _held is not None


@contextmanager
def hold_weight_grads() -> Iterator[list[Callable[[], None]]]:
    """Collect the functions that are passed to `defer_weight_grad` inside the block, in order; the caller runs them later."""
    global _held
    if _held is not None:
        raise RuntimeError("weight gradients are held already: an I runs inside another I")
    queue: list[Callable[[], None]] = []
    _held = queue
    try:
        yield queue
    finally:
        _held = None
