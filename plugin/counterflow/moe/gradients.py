"""Where a trainer keeps gradients: a small protocol, and the stores of trainers that keep them in ``.grad`` or in sums of them.

Clones reach a parameter's gradient through a `GradientStore` alone, so that the same code serves every trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False)
class Part:
    """One expert's part of a parameter that stacks those of all experts of a module: ``whole[index]``."""

    whole: torch.nn.Parameter
    index: int


Weight = torch.nn.Parameter | Part


def find_values(weight: Weight) -> torch.Tensor:
    """Return a weight's values; of a part a view, which is new each time: a trainer may give a parameter other memory."""
    return weight.whole.data[weight.index] if isinstance(weight, Part) else weight


# Runs what it is given at the W that is due for it, or at once.
Defer = Callable[[Callable[[], None]], None]


class GradientStore(Protocol):
    """A trainer's gradients, by parameter."""

    is_on_parameters: bool
    """Whether backward functions find a gradient's memory at the parameter that their forward has kept."""

    def of(self, parameter: Weight) -> torch.Tensor | None:
        """Return the tensor in which a step's gradients of a parameter are summed; None for a frozen parameter."""

    def add(self, parameter: Weight, gradient: torch.Tensor) -> None:
        """Add a gradient that was computed elsewhere to the parameter's own."""

    def prepare(self, parameter: Weight, like: Weight) -> None:
        """Let ``parameter``, which the trainer does not know, collect gradients as the trainer's ``like`` does."""

    def clear(self, parameter: Weight) -> None:
        """Set a gradient to zero at the begin of a step, for a parameter that `prepare` or `share` was called with."""

    def share(self, parameter: Weight, like: Weight, other: Weight | None, defer: Defer) -> None:
        """Do as `prepare`, in the memory of the gradient of ``other`` if that is given and the store keeps gradients in memory.

        What a backward leaves is added by ``defer``: at its W, since before it the memory may be another layer's.
        """

    def release(self, parameter: Weight) -> None:
        """Let go of a gradient that was taken by `of`, where the next backward would add to it."""


class PlainGradients:
    """Gradients in ``.grad``, where autograd leaves them. The trainer clears the ones of its own parameters before each step."""

    is_on_parameters = False

    def of(self, parameter: Weight) -> torch.Tensor | None:
        """Return ``.grad``, which is zeros before the first backward; None for a frozen parameter."""
        whole = parameter.whole if isinstance(parameter, Part) else parameter
        gradient = self.find(whole) if whole.requires_grad else None
        return gradient[parameter.index] if isinstance(parameter, Part) and gradient is not None else gradient

    def find(self, whole: torch.nn.Parameter) -> torch.Tensor:
        """Return the gradient of a whole parameter that is trained."""
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        return whole.grad

    def add(self, parameter: Weight, gradient: torch.Tensor) -> None:
        """Add a gradient that was computed elsewhere."""
        own = self.of(parameter)
        assert own is not None
        own.add_(gradient)

    def prepare(self, parameter: Weight, like: Weight) -> None:
        """Do nothing: autograd fills ``.grad`` of any parameter."""

    def clear(self, parameter: Weight) -> None:
        """Set the gradient to zero."""
        if isinstance(parameter, Part):
            # The parts of a parameter are cleared in turn.
            parameter.whole.grad = None
        else:
            parameter.grad = None

    def share(self, parameter: Weight, like: Weight, other: Weight | None, defer: Defer) -> None:
        """Let what a backward leaves in ``.grad`` come there at its W."""
        whole = parameter.whole if isinstance(parameter, Part) else parameter
        # The parts of a parameter come in turn.
        if whole.requires_grad and not (isinstance(parameter, Part) and parameter.index):
            whole.register_post_accumulate_grad_hook(partial(self._leave, defer))  # type: ignore[no-untyped-call]

    def release(self, parameter: Weight) -> None:
        """Drop ``.grad``."""
        self.clear(parameter)

    def _leave(self, defer: Defer, whole: torch.nn.Parameter) -> None:
        gradient, whole.grad = whole.grad, None
        assert gradient is not None
        defer(partial(self._put, whole, gradient))

    def _put(self, whole: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        whole.grad = gradient if whole.grad is None else whole.grad.add_(gradient)


class SummedGradients(PlainGradients):
    """Gradients of a trainer that adds up, in sums of type ``dtype``, what each backward leaves in ``.grad``.

    ``find_sum`` returns the sum of one of the trainer's parameters. Clones have sums of their own.
    """

    def __init__(self, find_sum: Callable[[torch.nn.Parameter], torch.Tensor], dtype: torch.dtype) -> None:
        self._find_sum, self._dtype = find_sum, dtype
        self._sums: Any = WeakTensorKeyDictionary()

    @classmethod
    def in_attribute(cls, name: str, dtype: torch.dtype) -> "SummedGradients":
        """Return the store of a trainer whose parameters have their sums in an attribute, None before a step's first backward."""

        def find(whole: Any) -> torch.Tensor:
            if getattr(whole, name) is None:
                setattr(whole, name, torch.zeros_like(whole, dtype=dtype))
            return getattr(whole, name)  # type: ignore[no-any-return]

        return cls(find, dtype)

    def find(self, whole: torch.nn.Parameter) -> torch.Tensor:
        """Return the sum of a whole parameter that is trained."""
        own: torch.Tensor | None = self._sums.get(whole)
        return self._find_sum(whole) if own is None else own

    def prepare(self, parameter: Weight, like: Weight) -> None:
        """Give ``parameter`` a sum."""
        whole = parameter.whole if isinstance(parameter, Part) else parameter
        if whole.requires_grad and whole not in self._sums:
            self._sums[whole] = torch.zeros_like(whole, dtype=self._dtype)
            whole.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]

    def clear(self, parameter: Weight) -> None:
        """Set a clone's sum to zero."""
        if (own := self.of(parameter)) is not None:
            own.zero_()

    def share(self, parameter: Weight, like: Weight, other: Weight | None, defer: Defer) -> None:
        """Give ``parameter`` the sum of ``other``, or one of its own."""
        whole = parameter.whole if isinstance(parameter, Part) else parameter
        if whole.requires_grad and whole not in self._sums:
            kept = other.whole if isinstance(other, Part) else other
            self._sums[whole] = torch.zeros_like(whole, dtype=self._dtype) if kept is None else self._sums[kept]
            super().share(parameter, like, other, defer)

    def release(self, parameter: Weight) -> None:
        """Do nothing: a sum stays where it is."""

    def _put(self, whole: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        self._sums[whole].add_(gradient)

    def _add(self, whole: torch.Tensor) -> None:
        self._sums[whole].add_(whole.grad)
        whole.grad = None
