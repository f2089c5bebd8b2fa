"""Where a trainer keeps gradients: a small protocol, and the store of a trainer that keeps them in ``.grad``.

Clones reach a parameter's gradient through a `GradientStore` alone, so that the same code serves every trainer.
"""

from typing import Protocol

import torch


class GradientStore(Protocol):
    """A trainer's gradients, by parameter."""

    def of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return the tensor in which a step's gradients of a parameter are summed; None for a frozen parameter."""

    def add(self, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a gradient that was computed elsewhere to the parameter's own."""

    def prepare(self, parameter: torch.nn.Parameter, like: torch.nn.Parameter) -> None:
        """Let ``parameter``, which the trainer does not know, collect gradients as the trainer's ``like`` does."""

    def clear(self, parameter: torch.nn.Parameter) -> None:
        """Set a gradient to zero at the begin of a step, for a parameter that `prepare` was called with."""


class PlainGradients:
    """Gradients in ``.grad``, where autograd leaves them. The trainer clears the ones of its own parameters before each step."""

    def of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return ``parameter.grad``, which is zeros before the first backward; None for a frozen parameter."""
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def add(self, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a gradient that was computed elsewhere."""
        own = self.of(parameter)
        assert own is not None
        own.add_(gradient)

    def prepare(self, parameter: torch.nn.Parameter, like: torch.nn.Parameter) -> None:
        """Do nothing: autograd fills ``.grad`` of any parameter."""

    def clear(self, parameter: torch.nn.Parameter) -> None:
        """Forget the gradient."""
        parameter.grad = None
