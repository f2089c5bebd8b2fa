"""What an optimizer keeps for a weight, besides counters of its steps: it moves with an expert's home."""

from typing import Any

import torch

from counterflow.errors import SeamError

# Optimizers whose state has a number for each number of a weight, which no other changes. Norms of whole weights, or rows and
# columns of them, would be those of other experts' weights too, where a parameter stacks several experts.
ELEMENTWISE = {
    "Adagrad", "Adam", "AdamW", "DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLion",
    "RMSprop", "SGD",
}  # fmt: skip


def find_elementwise_obstacle(optimizer: Any) -> str | None:
    """Return why homes in stacked weights cannot move with an optimizer, as the end of a sentence; None if they can."""
    if {one.__name__ for one in type(optimizer).__mro__} & ELEMENTWISE:
        return None
    return (
        f"moves the state of optimizers that treat each number alone ({', '.join(sorted(ELEMENTWISE))}), and "
        f"{type(optimizer).__name__} is given"
    )


def list_moments(state: dict[str, Any], like: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of an optimizer's state that have the shape of ``like``, by their names' order.

    Step counters, which are equal for all parameters, are left out.
    """
    return [value for _, value in sorted(state.items()) if torch.is_tensor(value) and value.shape == like.shape]


def refuse_unknown(optimizer: Any, shape: torch.Size) -> SeamError:
    """Return the error for a weight of which an optimizer knows nothing."""
    return SeamError(
        f"{type(optimizer).__name__} does not say what it keeps for an expert's weight of shape {tuple(shape)}: "
        "drop --cf-eplb-rehome-interval"
    )
