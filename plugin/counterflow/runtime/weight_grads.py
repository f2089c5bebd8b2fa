"""Weight-gradient work that an I leaves for its W.

A backward that can compute its weight gradients later hands that work to `defer_weight_grad`. In a B, and wherever nobody
holds the work back, it runs at once. In an I the executor holds it (`hold_weight_grads`) until the table's W.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# One queue of the whole process, not of a thread: on a GPU, autograd runs backward functions in threads of its own.
_held: list[Callable[[], None]] | None = None


def defer_weight_grad(fn: Callable[[], None]) -> None:
    """Run ``fn``, which adds a weight's gradient to where gradients are kept: at once in a B, at the W in an I."""
    if _held is None:
        fn()
    else:
        _held.append(fn)


def is_holding() -> bool:
    """Tell whether what is handed over now waits for its W."""
    return _held is not None


@contextmanager
def hold_weight_grads() -> Iterator[list[Callable[[], None]]]:
    """Collect what `defer_weight_grad` is given inside the block, in order; the caller runs it later."""
    global _held
    if _held is not None:
        raise RuntimeError("weight gradients are held already: an I runs inside another I")
    queue: list[Callable[[], None]] = []
    _held = queue
    try:
        yield queue
    finally:
        _held = None
